//! Cuts text into the words inside which BPE merges: GPT-2's pre-tokenization.
//!
//! GPT-2 (Radford et al., 2019) defines it by a regular expression,
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. The scanner below accepts
//! exactly that, one class of characters at a time: `\p{L}` and `\p{N}` are Unicode's general
//! categories (which `char::is_alphabetic` and `char::is_numeric` are not), `\s` is White_Space.

use unicode_general_category::{get_general_category, GeneralCategory};

/// The words of a text, in order; joined, they are the text again.
pub fn words(text: &str) -> Words<'_> {
    Words { rest: text }
}

/// Iterator over the words of a text, made by [`words`].
pub struct Words<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let (word, rest) = self.rest.split_at(first_word(self.rest));
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Space,
    Other,
}

const ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b'\t'..=b'\r' | b' ' => Class::Space,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

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

/// The class of the character at byte `at`, and how many bytes it takes; None at the end of the
/// text.
#[inline]
fn class_at(text: &str, at: usize) -> Option<(Class, usize)> {
    let byte = *text.as_bytes().get(at)?;
    if byte.is_ascii() {
        return Some((ASCII[usize::from(byte)], 1));
    }
    let c = text[at..].chars().next()?;
    Some((class(c), c.len_utf8()))
}

/// How many bytes the first word takes; 0 if the text is empty.
fn first_word(text: &str) -> usize {
    let contraction = contraction(text.as_bytes());
    if contraction > 0 {
        return contraction;
    }
    // A single space belongs to the word after it.
    let lead = usize::from(text.starts_with(' '));
    match class_at(text, lead) {
        Some((Class::Space, _)) | None => whitespace(text),
        Some((class, width)) => run(text, lead + width, class),
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

/// Where the run of one class that goes on at byte `at` ends.
fn run(text: &str, mut at: usize, class: Class) -> usize {
    while let Some((next, width)) = class_at(text, at) {
        if next != class {
            break;
        }
        at += width;
    }
    at
}

/// How many bytes of white space at the start are one word: all of it, but if something else
/// follows, the last character is left over, since a space would belong to that.
fn whitespace(text: &str) -> usize {
    let (mut last, mut end) = (0, 0);
    while let Some((Class::Space, width)) = class_at(text, end) {
        (last, end) = (end, end + width);
    }
    if end == text.len() || last == 0 {
        end
    } else {
        last
    }
}

#[cfg(test)]
mod tests {
    use super::words;

    fn split(text: &str) -> Vec<&str> {
        words(text).collect()
    }

    #[test]
    fn contractions_are_lower_case_and_start_a_word() {
        assert_eq!(split("we'll they've"), ["we", "'ll", " they", "'ve"]);
        assert_eq!(split("WE'LL"), ["WE", "'", "LL"]);
        assert_eq!(split("say 'so' !'s"), ["say", " '", "so", "'", " !'", "s"]);
    }

    #[test]
    fn the_last_space_of_a_run_belongs_to_the_next_word() {
        assert_eq!(split("a   b"), ["a", "  ", " b"]);
        assert_eq!(split("a\n\nb"), ["a", "\n", "\n", "b"]);
        assert_eq!(split(" = T = \n"), [" =", " T", " =", " \n"]);
        assert_eq!(split("a\u{a0}\u{2003}b  "), ["a", "\u{a0}", "\u{2003}", "b", "  "]);
    }

    #[test]
    fn classes_are_unicode_categories() {
        assert_eq!(split("x²Ⅷ③ñ"), ["x", "²Ⅷ③", "ñ"]);
        // A combining mark is neither a letter nor a number, though Unicode calls some alphabetic.
        assert_eq!(split("a\u{345}b"), ["a", "\u{345}", "b"]);
        assert_eq!(split(""), [""; 0]);
    }
}
