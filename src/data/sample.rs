//! The sample corpus: short stories that a small grammar makes. Nobody wrote or collected them, the same bytes come out on
//! every machine, and any amount of them can be had.
//!
//! A language of a few hundred words is one that a model of a million parameters learns in a minute, an idea of Eldan
//! and Li 2023, "TinyStories". The text is written as WikiText is: a title between equals signs, tokens between spaces.

use std::collections::HashMap;

use super::wikitext::Split;
use crate::random::mix;

/// Bytes of the corpus, all splits together, unless its user asks for another size.
pub const BYTES: u64 = 300_000;
/// Every story is a function of this number and of its own.
const SEED: u64 = 20_250_901;
/// Of this many stories in turn, the last one is for the test, and the one before it for validation.
const TURN: u64 = 20;

/// The grammar: parts, and what each can become. `[name]` in a text stands for a part. A part in capitals is chosen once
/// a story; any other is chosen anew each time, and none of its alternatives twice before all of them were used. A part
/// of several names has as many forms: where `[HERO]` is Anna, `[he]` is she.
#[rustfmt::skip]
const GRAMMAR: &[(&str, &[&str])] = &[
    // A story: its title, and its paragraphs between bars.
    ("STORY", &[
        "[HERO] and the [COLOUR] [ANIMAL]|[begin] [weather] [lost] [poor] [ask] [answer]|[rescue] [saved] [kept] [night]",
        "[HERO] and the [ANIMAL]|[begin] [lost] [poor] [weather] [answer]|[ask] [rescue] [kept]",
        "The [COLOUR] [TREASURE]|[had] [gone] [search] [search] [tears]|[found] [laugh] [care]",
        "[HERO] and the [TREASURE]|[had] [begin] [gone] [tears] [search]|[found] [laugh] [night]",
        "Half of the [FOOD]|[begin] [weather] [basket] [beggar] [hungry]|[share] [thanks] [reward] [home]",
        "How [HERO] learned to [LEARN]|[cannot] [teacher] [lesson] [fail] [again]|[fail] [again] [learned] [teach]",
        "[HERO] builds [BUILD]|[begin] [plan] [wood] [work]|[storm] [mend] [built] [joy] [home]",
        "A noise in the night|[dark] [weather] [noise] [fear] [fear]|[light] [only] [calm] [asleep]",
    ]),

    ("HERO/he/him/his/He/His", &[
        "Anna/she/her/her/She/Her", "Ben/he/him/his/He/His", "Clara/she/her/her/She/Her", "David/he/him/his/He/His",
        "Emma/she/her/her/She/Her", "Felix/he/him/his/He/His", "Grace/she/her/her/She/Her", "Henry/he/him/his/He/His",
        "Ida/she/her/her/She/Her", "Jacob/he/him/his/He/His", "Lily/she/her/her/She/Her", "Max/he/him/his/He/His",
        "Nora/she/her/her/She/Her", "Oscar/he/him/his/He/His", "Rosa/she/her/her/She/Her", "Tom/he/him/his/He/His",
    ]),
    ("FRIEND", &["grandmother", "grandfather", "mother", "father", "sister", "brother", "aunt", "uncle"]),
    ("PLACE", &[
        "the market", "the river", "the forest", "the garden", "the hill", "the lake", "the beach", "the old mill",
        "the harbour", "the park",
    ]),
    ("COLOUR", &["blue", "red", "green", "white", "black", "brown", "yellow", "grey"]),
    ("ANIMAL", &["bird", "cat", "dog", "rabbit", "fox", "duck", "horse", "mouse", "goat", "lamb"]),
    ("TREASURE", &["key", "ring", "ball", "kite", "hat", "coin", "boat", "bell", "book", "lamp"]),
    ("FOOD", &["bread", "soup", "cake", "cheese", "honey", "fruit"]),
    ("LEARN/there", &[
        "swim/in the lake", "read/at the kitchen table", "sing/by the fire", "dance/in the kitchen", "fish/by the river",
        "paint/in the garden", "ride/on the hill", "row/on the lake",
    ]),
    ("BUILD", &["a little house", "a bridge", "a boat", "a swing", "a tower", "a bench"]),

    ("small", &["small", "little", "tiny", "young"]),
    ("went", &["went", "walked", "ran"]),
    ("long", &["for a long time", "for an hour", "until noon", "the whole afternoon"]),
    ("day", &[
        "One morning", "One day", "One evening", "One summer day", "One winter morning", "One autumn day",
        "Early one morning",
    ]),
    ("weather", &[
        "The sun was warm .", "The wind was cold .", "It was raining a little .", "The sky was clear .",
        "There was snow on the ground .", "The air smelled of flowers .", "There was not a sound .",
    ]),
    ("begin", &[
        "[day] [HERO] [went] to [PLACE] .", "[day] [HERO] and [his] [FRIEND] [went] to [PLACE] .",
        "[HERO] liked to go to [PLACE] . [day] [he] went there again .",
    ]),
    ("home", &[
        "Then [he] [went] home .", "When it was dark , [HERO] went home .", "[He] was home before the moon came up .",
        "In the evening [HERO] told [his] [FRIEND] all about it .",
    ]),
    ("night", &[
        "That night [he] slept well .", "That night [he] dreamed of [PLACE] .", "[He] was very happy .",
        "It had been a good day .",
    ]),

    // An animal is lost.
    ("lost", &[
        "There [he] found a [COLOUR] [ANIMAL] .", "There [he] saw a [small] [COLOUR] [ANIMAL] under a tree .",
        "A [COLOUR] [ANIMAL] sat by the path .",
    ]),
    ("poor", &["It looked sad .", "It was all alone .", "It was cold and hungry .", "It had hurt its foot ."]),
    ("ask", &[
        "\" Where is your home ? \" asked [HERO] .", "\" Are you lost ? \" asked [HERO] .",
        "\" Do not be afraid , \" said [HERO] .", "[HERO] looked at it [long] .",
    ]),
    ("answer", &[
        "The [ANIMAL] only looked at [him] .", "The [ANIMAL] came a little closer .", "The [ANIMAL] made a soft sound .",
    ]),
    ("rescue", &[
        "[HERO] took it in [his] arms and carried it home .", "[HERO] gave it some [FOOD] and water .",
        "[HERO] put [his] coat around it .", "[HERO] and [his] [FRIEND] made a warm bed for it .",
    ]),
    ("saved", &[
        "Soon the [ANIMAL] was well again .", "The next day the [ANIMAL] could run again .",
        "After a week the [ANIMAL] was strong .",
    ]),
    ("kept", &[
        "From that day on , the [COLOUR] [ANIMAL] was a friend .", "The [ANIMAL] came back to see [HERO] every day .",
        "[HERO] and the [ANIMAL] went everywhere together .",
    ]),

    // A thing is lost.
    ("had", &[
        "[HERO] had a [COLOUR] [TREASURE] .", "[HERO] had a [COLOUR] [TREASURE] from [his] [FRIEND] .",
        "There was a [COLOUR] [TREASURE] that [HERO] loved very much .",
    ]),
    ("gone", &[
        "[day] the [TREASURE] was gone .", "[day] [HERO] could not find the [TREASURE] .",
        "[day] [HERO] lost the [TREASURE] on the way to [PLACE] .",
    ]),
    ("search", &[
        "[He] looked under the bed .", "[He] looked behind the door .", "[He] looked in every room .",
        "[He] asked [his] [FRIEND] .", "[He] went back to [PLACE] .", "[He] searched [long] .",
    ]),
    ("tears", &[
        "[HERO] began to cry .", "[HERO] was very sad .", "\" It is gone , \" said [HERO] .", "But it was not there .",
    ]),
    ("found", &[
        "Then a [ANIMAL] came with the [TREASURE] in its mouth .",
        "Then [his] [FRIEND] saw something [COLOUR] in the grass .",
        "At last [he] found it in [his] own pocket .", "At last [he] found it under a stone near [PLACE] .",
    ]),
    ("laugh", &[
        "[HERO] laughed and laughed .", "\" Thank you ! \" said [HERO] .", "\" There you are ! \" said [HERO] .",
    ]),
    ("care", &[
        "[HERO] never lost the [COLOUR] [TREASURE] again .", "From then on , [he] kept the [TREASURE] in a box .",
        "[He] held the [TREASURE] all the way home .",
    ]),

    // Something is shared.
    ("basket", &[
        "[HERO] had a basket with [FOOD] .", "[His] [FRIEND] gave [him] some [FOOD] for the way .",
        "In [his] bag there was some [FOOD] .",
    ]),
    ("beggar", &[
        "On the way [he] met an old man .", "On the way [he] met an old woman .", "By the road sat a [small] girl .",
        "By the road sat a [small] boy .",
    ]),
    ("hungry", &[
        "\" I am so hungry , \" said a quiet voice .", "\" Have you something to eat ? \" asked a quiet voice .",
    ]),
    ("share", &[
        "[HERO] gave away half of the [FOOD] .", "[HERO] shared the [FOOD] .",
        "\" Take this , \" said [HERO] , and gave away half of the [FOOD] .",
    ]),
    ("thanks", &[
        "\" You are very kind , \" said the voice .", "They sat together and ate .", "They ate and talked [long] .",
    ]),
    ("reward", &[
        "The next day there was a [COLOUR] [TREASURE] at the door .", "When [HERO] looked again , the basket was full .",
        "The [FOOD] had never been so good .",
    ]),

    // Something is learned.
    ("cannot", &[
        "[HERO] could not [LEARN] .", "All the other children could [LEARN] , but [HERO] could not .",
        "[HERO] wanted to learn to [LEARN] .",
    ]),
    ("teacher", &[
        "\" I will show you , \" said [his] [FRIEND] .", "\" It is not hard , \" said [his] [FRIEND] .",
    ]),
    ("lesson", &[
        "Every day they met [there] .", "They began [there] .", "[day] they tried it [there] .",
    ]),
    ("fail", &[
        "The first time it went wrong .", "[HERO] was afraid .", "It was harder than it looked .",
        "\" I can not do it , \" said [HERO] .",
    ]),
    ("again", &[
        "\" Try again , \" said [his] [FRIEND] .", "But [HERO] did not stop .", "[He] tried again and again .",
    ]),
    ("learned", &[
        "After a week [HERO] could [LEARN] .", "And then , all at once , [he] could [LEARN] .",
        "By the end of summer nobody could [LEARN] as well as [HERO] .",
    ]),
    ("teach", &[
        "Now [HERO] teaches the little ones .", "[His] [FRIEND] was very proud .", "\" Look at me ! \" said [HERO] .",
    ]),

    // Something is built.
    ("plan", &[
        "\" Let us build [BUILD] , \" said [HERO] .", "[HERO] wanted to build [BUILD] .",
        "There [HERO] and [his] [FRIEND] began to build [BUILD] .",
    ]),
    ("wood", &[
        "They found some old wood .", "They carried stones and wood .", "[His] [FRIEND] brought a hammer .",
    ]),
    ("work", &[
        "They worked [long] .", "They worked day after day .", "A [COLOUR] [ANIMAL] sat there and watched them .",
    ]),
    ("storm", &[
        "Then a storm came and broke it .", "In the night the wind blew it down .", "But one side fell down .",
    ]),
    ("mend", &[
        "\" We will make it stronger , \" said [his] [FRIEND] .", "The next morning they began again .",
        "[HERO] was sad , but [he] did not give up .",
    ]),
    ("built", &["This time it stood .", "At last it was done .", "In the end it was better than before ."]),
    ("joy", &["All the children came to see it .", "It is still there today .", "They painted it [COLOUR] ."]),

    // Something moves in the dark.
    ("dark", &["One night [HERO] woke up .", "It was night , and [HERO] lay in bed .", "One night [HERO] could not sleep ."]),
    ("noise", &[
        "Then there was a noise at the door .", "Then there was a sound behind the house .",
        "Then something moved under the window .",
    ]),
    ("fear", &[
        "[HERO] was afraid .", "[HERO] did not move .", "\" Who is there ? \" asked [HERO] .", "[He] called [his] [FRIEND] .",
    ]),
    ("light", &[
        "[He] took a lamp and opened the door .", "[His] [FRIEND] came with a lamp .", "[He] went to look , step by step .",
    ]),
    ("only", &[
        "It was only a [COLOUR] [ANIMAL] .", "There sat a [small] [ANIMAL] and looked at the moon .",
        "A hungry [ANIMAL] was looking for [FOOD] .",
    ]),
    ("calm", &[
        "[HERO] laughed and gave it some [FOOD] .", "\" Come in , \" said [HERO] .",
        "\" You are as afraid as I am , \" said [HERO] .",
    ]),
    ("asleep", &[
        "Soon they were both asleep .", "[HERO] went back to bed and slept .",
        "After that [HERO] was not afraid of the dark .",
    ]),
];

/// The stories of a split, in order and without an end.
fn stories(split: Split) -> impl Iterator<Item = String> {
    (0..).filter(move |number| split_of(*number) == split).map(|number| Storyteller::new(number).tell())
}

fn split_of(story: u64) -> Split {
    match TURN - 1 - story % TURN {
        0 => Split::Test,
        1 => Split::Valid,
        _ => Split::Train,
    }
}

/// The text of a split of a corpus of `bytes` bytes: whole stories, as many as begin within its share, and one at least.
pub fn text(split: Split, bytes: u64) -> String {
    let share = match split {
        Split::Train => bytes - 2 * (bytes / TURN),
        Split::Valid | Split::Test => bytes / TURN,
    };
    let mut text = String::new();
    for story in stories(split) {
        text += &story;
        if text.len() as u64 >= share {
            break;
        }
    }
    text
}

/// Tells one story.
struct Storyteller {
    seed: u64,
    draws: u64,
    /// What the parts in capitals stand for.
    chosen: HashMap<&'static str, &'static str>,
    /// The alternatives of each other part that this story has used.
    used: HashMap<&'static str, Vec<&'static str>>,
}

impl Storyteller {
    fn new(story: u64) -> Self {
        Self { seed: mix(SEED, story), draws: 0, chosen: HashMap::new(), used: HashMap::new() }
    }

    fn tell(mut self) -> String {
        let told = self.part("STORY");
        let mut paragraphs = told.split('|');
        let title = paragraphs.next().unwrap_or_default();
        let mut story = format!(" \n = {title} = \n \n");
        for paragraph in paragraphs {
            story += &format!(" {paragraph} \n");
        }
        story
    }

    /// A text with its parts filled in.
    fn fill(&mut self, text: &'static str) -> String {
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, name, after)) = next_part(rest) {
            filled += before;
            filled += &self.part(name);
            rest = after;
        }
        filled + rest
    }

    fn part(&mut self, name: &'static str) -> String {
        let found = GRAMMAR.iter().find_map(|(names, alternatives)| {
            names.split('/').position(|each| each == name).map(|form| (*names, form, *alternatives))
        });
        let (names, form, alternatives) = found.expect("the grammar has every part it names");
        let alternative = if names.starts_with(char::is_uppercase) {
            match self.chosen.get(names) {
                Some(alternative) => alternative,
                None => {
                    let alternative = self.draw(alternatives);
                    self.chosen.insert(names, alternative);
                    alternative
                }
            }
        } else {
            let used = self.used.entry(names).or_default();
            if used.len() == alternatives.len() {
                used.clear();
            }
            let fresh: Vec<_> =
                alternatives.iter().copied().filter(|alternative| !used.contains(alternative)).collect();
            let alternative = self.draw(&fresh);
            self.used.entry(names).or_default().push(alternative);
            alternative
        };
        let form = alternative.split('/').nth(form).expect("an alternative has every form of its part");
        self.fill(form)
    }

    fn draw(&mut self, alternatives: &[&'static str]) -> &'static str {
        self.draws += 1;
        alternatives[(mix(self.seed, self.draws) % alternatives.len() as u64) as usize]
    }
}

/// What comes before the first part that a text names, its name, and what comes after it.
fn next_part(text: &'static str) -> Option<(&'static str, &'static str, &'static str)> {
    let (before, rest) = text.split_once('[')?;
    let (name, after) = rest.split_once(']')?;
    Some((before, name, after))
}
