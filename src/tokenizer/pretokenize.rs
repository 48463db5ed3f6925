//! Cuts text into the words inside which BPE merges: GPT-2's pre-tokenization.
//!
//! GPT-2 (Radford et al., 2019) defines it by a regular expression,
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`; each line, with its newline, is a text
//! of its own. `\p{L}` and `\p{N}` are Unicode's general categories (which `char::is_alphabetic` and `char::is_numeric`
//! are not), `\s` is White_Space.
//!
//! No character is looked at alone: the bytes of a block of 64 are classified at once, into a bit for each, and where
//! words start follows from a few operations on these masks. The tests hold the same rules, a character at a time.

use unicode_general_category::{get_general_category, GeneralCategory};
use wide::u8x64;

/// Calls `each` with where every word of a text starts and ends, in order; joined, they are the text again.
#[inline]
pub fn for_each_word(text: &str, mut each: impl FnMut(usize, usize)) {
    let (mut scanner, mut ends, mut start) = (Scanner::new(text), [0; ROOM], 0);
    loop {
        let ends = scanner.next_words(&mut ends);
        if ends.is_empty() {
            break;
        }
        for &end in ends {
            each(start, end);
            start = end;
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Space,
    Other,
}

fn class(c: char) -> Class {
    use GeneralCategory::*;
    if c.is_whitespace() {
        return Class::Space;
    }
    match get_general_category(c) {
        UppercaseLetter | LowercaseLetter | TitlecaseLetter | ModifierLetter | OtherLetter => Class::Letter,
        DecimalNumber | LetterNumber | OtherNumber => Class::Number,
        _ => Class::Other,
    }
}

/// The bytes that are looked at together.
const BLOCK: usize = 64;

/// As many words are cut at a time, at most.
pub(super) const ROOM: usize = 2 * BLOCK;

/// Which bytes of a block belong to characters of a class: bit i for byte i.
#[derive(Clone, Copy, Default)]
struct Masks {
    letters: u64,
    numbers: u64,
    spaces: u64,
    /// Of the spaces, the character ' '.
    blanks: u64,
    newlines: u64,
    apostrophes: u64,
    /// Bytes of characters that are not ASCII.
    wide: u64,
}

impl Masks {
    /// Bytes that are neither letters, numbers nor spaces.
    fn others(&self) -> u64 {
        !(self.letters | self.numbers | self.spaces)
    }
}

/// Finds the words of a text, block by block.
pub(super) struct Scanner<'a> {
    text: &'a str,
    /// Where the next block begins.
    at: usize,
    before: Masks,
    /// What a contraction at the end of the last block says of the next: where no word starts, and where one does.
    inside: u64,
    after: u64,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        // The text's start is like a line's.
        let before = Masks { spaces: !0, newlines: !0, ..Masks::default() };
        Self { text, at: 0, before, inside: 0, after: 0 }
    }

    /// Where the next words end: a block's at least; none once there are no more.
    #[inline]
    pub(super) fn next_words<'b>(&mut self, ends: &'b mut [usize; ROOM]) -> &'b [usize] {
        let mut count = 0;
        while let Some(room) = ends[count..].first_chunk_mut::<BLOCK>() {
            let Some((offset, mut bits)) = self.next_block() else { break };
            let words = bits.count_ones() as usize;
            let mut write = |room: &mut [usize]| {
                for end in room {
                    *end = offset + bits.trailing_zeros() as usize;
                    bits &= bits.wrapping_sub(1);
                }
            };
            // The processor cannot predict how many words a block has. So eight are written, or sixteen, and what is
            // not there is written over.
            write(&mut room[..8]);
            if words > 8 {
                write(&mut room[8..16]);
            }
            if words > 16 {
                write(&mut room[16..words]);
            }
            count += words;
        }
        &ends[..count]
    }

    /// The offset of the next block, and before which of its bytes a word ends. The last block is a part of one, or
    /// empty.
    #[inline]
    fn next_block(&mut self) -> Option<(usize, u64)> {
        let (offset, rest) = (self.at, self.text.as_bytes().get(self.at..)?);
        let mut padded = [b' '; BLOCK];
        let (block, text_end) = match rest.first_chunk::<BLOCK>() {
            Some(block) => (block, 0),
            None => {
                padded[..rest.len()].copy_from_slice(rest);
                (&padded, 1 << rest.len())
            }
        };
        let mut masks = ascii_masks(block);
        self.at += BLOCK;

        // A space that something else follows, which starts a word even amid spaces. What ends the text is none.
        let spaces_after = self.text.as_bytes().get(self.at).is_none_or(|&byte| self.is_space(byte));
        let mut last = 0;
        if masks.wide != 0 {
            last = self.add_wide(offset, &mut masks);
        }
        last |= masks.spaces & !(masks.spaces >> 1 | u64::from(spaces_after) << (BLOCK - 1)) & !masks.wide;

        // Each byte's neighbour on the left.
        let before = std::mem::replace(&mut self.before, masks);
        let left = |mask: u64, before: u64| mask << 1 | before >> (BLOCK - 1);
        let goes_on = masks.letters & left(masks.letters, before.letters)
            | masks.numbers & left(masks.numbers, before.numbers)
            | masks.others() & left(masks.others(), before.others())
            | masks.spaces & left(masks.spaces, before.spaces)
            // A single blank belongs to the word after it.
            | !masks.spaces & left(masks.blanks, before.blanks);
        let mut starts = !goes_on | last & !masks.newlines | left(masks.newlines, before.newlines);

        let contractions = masks.apostrophes & starts & !left(masks.blanks, before.blanks);
        if contractions | self.inside | self.after != 0 {
            starts = self.contract(offset, contractions, starts);
        }
        // A word ends where the next starts and where the text ends, but none where the text starts.
        let ends = starts & u64::wrapping_sub(text_end, 1) | text_end;
        Some((offset, ends & !u64::from(offset == 0)))
    }

    /// Whether the character that begins at the start of the next block, with this byte, is a space.
    fn is_space(&self, byte: u8) -> bool {
        match byte.is_ascii() {
            true => matches!(byte, b'\t'..=b'\r' | b' '),
            // Asked only after a space, so that a character does begin there.
            false => self.text.get(self.at..).and_then(|rest| rest.chars().next()).is_some_and(char::is_whitespace),
        }
    }

    /// Adds the characters that are not ASCII to the masks. Returns the spaces among them that something else follows.
    #[cold]
    fn add_wide(&self, offset: usize, masks: &mut Masks) -> u64 {
        let (mut left, mut last) = (masks.wide, 0);
        while left != 0 {
            let mut at = offset + left.trailing_zeros() as usize;
            // The block may begin inside a character.
            while !self.text.is_char_boundary(at) {
                at -= 1;
            }
            let mut rest = self.text[at..].chars();
            let Some(c) = rest.next() else { break };
            let bytes = (1_u64 << c.len_utf8()) - 1;
            let bits = if at < offset { bytes >> (offset - at) } else { bytes << (at - offset) };
            match class(c) {
                Class::Letter => masks.letters |= bits,
                Class::Number => masks.numbers |= bits,
                Class::Other => {}
                Class::Space => {
                    masks.spaces |= bits;
                    if at >= offset && rest.next().is_some_and(|next| !next.is_whitespace()) {
                        last |= 1 << (at - offset);
                    }
                }
            }
            left &= !bits;
        }
        last
    }

    /// Puts contractions that begin at these bytes in place of the words there.
    #[cold]
    fn contract(&mut self, offset: usize, mut apostrophes: u64, starts: u64) -> u64 {
        let (mut inside, mut after) = (u128::from(self.inside), u128::from(self.after));
        while apostrophes != 0 {
            let bit = apostrophes.trailing_zeros() as usize;
            let length = contraction(&self.text.as_bytes()[offset + bit..]);
            if length > 0 {
                inside |= 2 << bit;
                after |= 1 << (bit + length);
            }
            apostrophes &= apostrophes - 1;
        }
        (self.inside, self.after) = ((inside >> BLOCK) as u64, (after >> BLOCK) as u64);
        starts & !(inside as u64) | after as u64
    }
}

/// How many bytes an English contraction at the start takes, its apostrophe included; 0 if there
/// is none.
fn contraction(text: &[u8]) -> usize {
    match text {
        [b'\'', b's' | b't' | b'm' | b'd', ..] => 2,
        [b'\'', b'r' | b'v', b'e', ..] | [b'\'', b'l', b'l', ..] => 3,
        _ => 0,
    }
}

/// The masks of a block, in which bytes of wide characters are of no class yet.
#[inline]
fn ascii_masks(block: &[u8; BLOCK]) -> Masks {
    let bytes = u8x64::new(*block);
    let is = |byte: u8| bytes.simd_eq(u8x64::splat(byte));
    let within = |bytes: u8x64, first: u8, count: u8| (bytes - u8x64::splat(first)).simd_lt(u8x64::splat(count));
    let blanks = is(b' ');
    Masks {
        letters: within(bytes | u8x64::splat(0x20), b'a', 26).to_bitmask(),
        numbers: within(bytes, b'0', 10).to_bitmask(),
        spaces: (blanks | within(bytes, b'\t', 5)).to_bitmask(),
        blanks: blanks.to_bitmask(),
        newlines: is(b'\n').to_bitmask(),
        apostrophes: is(b'\'').to_bitmask(),
        wide: within(bytes, 128, 128).to_bitmask(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(text: &str) -> Vec<&str> {
        let mut words = Vec::new();
        for_each_word(text, |start, end| words.push(&text[start..end]));
        words
    }

    /// The same, a line and then a character at a time.
    fn split_plainly(text: &str) -> Vec<&str> {
        let mut words = Vec::new();
        for mut line in text.split_inclusive('\n') {
            while !line.is_empty() {
                let (word, rest) = line.split_at(first_word(line));
                words.push(word);
                line = rest;
            }
        }
        words
    }

    fn first_word(text: &str) -> usize {
        let contraction = contraction(text.as_bytes());
        if contraction > 0 {
            return contraction;
        }
        let first = |text: &str| text.chars().next().map(class);
        let run = |text: &str, class| text.find(|c| super::class(c) != class).unwrap_or(text.len());
        // A single blank belongs to the word after it.
        let lead = usize::from(text.starts_with(' '));
        match first(&text[lead..]) {
            Some(class) if class != Class::Space => lead + run(&text[lead..], class),
            _ => {
                let spaces = &text[..run(text, Class::Space)];
                let last = spaces.char_indices().last().map_or(0, |(at, _)| at);
                // All white space is one word, but if something else follows, the last character is left over.
                if spaces.len() == text.len() || last == 0 {
                    spaces.len()
                } else {
                    last
                }
            }
        }
    }

    #[test]
    fn contractions_are_lower_case_and_start_a_word() {
        assert_eq!(split("we'll they've"), ["we", "'ll", " they", "'ve"]);
        assert_eq!(split("WE'LL"), ["WE", "'", "LL"]);
        assert_eq!(split("say 'so' !'s"), ["say", " '", "so", "'", " !'", "s"]);
        assert_eq!(split("'really's's"), ["'re", "ally", "'s", "'s"]);
    }

    #[test]
    fn the_last_space_of_a_run_belongs_to_the_next_word() {
        assert_eq!(split("a   b"), ["a", "  ", " b"]);
        assert_eq!(split(" = T = \n"), [" =", " T", " =", " \n"]);
        assert_eq!(split("a\u{a0}\u{2003}b  "), ["a", "\u{a0}", "\u{2003}", "b", "  "]);
    }

    #[test]
    fn a_line_is_a_text_of_its_own() {
        assert_eq!(split("a\n\nb"), ["a", "\n", "\n", "b"]);
        assert_eq!(split("a \n  \n b\t\r\n"), ["a", " \n", "  \n", " b", "\t\r\n"]);
    }

    #[test]
    fn classes_are_unicode_categories() {
        assert_eq!(split("x²Ⅷ③ñ"), ["x", "²Ⅷ③", "ñ"]);
        // A combining mark is neither a letter nor a number, though Unicode calls some alphabetic.
        assert_eq!(split("a\u{345}b"), ["a", "\u{345}", "b"]);
        assert_eq!(split(""), [""; 0]);
    }

    #[test]
    fn blocks_begin_anywhere() {
        let text = "we'll 's  \u{2003} é\u{a0}漢字 12½ \u{3000}\u{3000}x𝕏'd\n\n 'really\t\t'tis (\u{345}!) \r\n";
        for shift in 0..2 * BLOCK {
            let text = format!("{}{text}", "x".repeat(shift)).repeat(3);
            assert_eq!(split(&text), split_plainly(&text), "{shift}");
        }
    }

    proptest! {
        #[test]
        fn blocks_give_the_words_of_single_characters(pieces in prop::collection::vec(prop_oneof![
            any::<char>().prop_map(String::from),
            "[a-zé漢]{1,9}",
            "'(s|t|re|ve|m|ll|d|l|r|x)?",
            "[ \t\r\n\u{a0}\u{3000}\u{85}]{1,4}",
            "[0-9²½Ⅷ٣]{1,5}",
            "[!-/\u{300}]{1,3}",
        ], 0..60)) {
            let text = pieces.concat();
            prop_assert_eq!(split(&text), split_plainly(&text));
        }

        #[test]
        fn masks_are_those_of_single_bytes(bytes: [u8; 32]) {
            let mut block = [0; BLOCK];
            for (at, byte) in block.iter_mut().enumerate() {
                *byte = bytes[at / 2].wrapping_add(at as u8 % 2);
            }
            let bits = |is: fn(&u8) -> bool| (0..).zip(&block).map(|(at, byte)| u64::from(is(byte)) << at).sum::<u64>();
            let masks = ascii_masks(&block);
            prop_assert_eq!(masks.letters, bits(u8::is_ascii_alphabetic));
            prop_assert_eq!(masks.numbers, bits(u8::is_ascii_digit));
            prop_assert_eq!(masks.spaces, bits(|byte| matches!(byte, b'\t'..=b'\r' | b' ')));
            prop_assert_eq!(masks.blanks, bits(|&byte| byte == b' '));
            prop_assert_eq!(masks.newlines, bits(|&byte| byte == b'\n'));
            prop_assert_eq!(masks.apostrophes, bits(|&byte| byte == b'\''));
            prop_assert_eq!(masks.wide, bits(|byte| !byte.is_ascii()));
        }
    }
}
