//! Where one document ends and the next begins, and which split each belongs to.

use std::borrow::Cow;

use super::wikitext::Split;
use crate::random::mix;

/// What counts as a document in plain text; records are documents of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Documents {
    /// Each line.
    Line,
    /// Each file.
    File,
    /// What is between blank lines.
    BlankLine,
    /// Each record, of files that consist of records.
    Record,
}

/// How the text of a file is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Not at all: it is left as it is, a missing newline at its end included.
    Whole,
    /// Where lines end, into training, validation and test: the places in bytes at or after which the latter two begin.
    Cut([u64; 2]),
    /// Into documents.
    Documents(Documents),
}

/// What a text consists of, in order.
#[derive(Debug)]
pub enum Event<'a> {
    /// A piece of a document: whole lines.
    Text(Split, Cow<'a, str>),
    /// The document ends whose pieces came last in this split; there was at least one.
    End(Split),
}

/// Gives each document its split, so that every stretch of 1 / share documents has one that is set aside, at a random place.
///
/// A function of the document's number alone: nothing depends on the machine, and small corpora get their share, too.
pub struct Sorter {
    valid: Draw,
    test: Draw,
}

impl Sorter {
    /// Sets these shares of the documents aside for validation and for the test; together they are below 1.
    pub fn new([valid, test]: [f64; 2]) -> Self {
        // The test split takes its documents first, and validation its share of the rest.
        Self {
            valid: Draw { share: valid / (1.0 - test), key: 1, seen: 0 },
            test: Draw { share: test, key: 2, seen: 0 },
        }
    }

    /// The split of the next document.
    pub fn sort(&mut self) -> Split {
        if self.test.takes() {
            Split::Test
        } else if self.valid.takes() {
            Split::Valid
        } else {
            Split::Train
        }
    }
}

struct Draw {
    share: f64,
    key: u64,
    seen: u64,
}

impl Draw {
    fn takes(&mut self) -> bool {
        let number = self.seen;
        self.seen += 1;
        if self.share == 0.0 {
            return false;
        }
        // Stretch k is the documents from start(k) to below start(k + 1).
        let start = |stretch: u64| (stretch as f64 / self.share).ceil() as u64;
        let mut stretch = (number as f64 * self.share) as u64;
        // Rounding may miss it by one.
        while start(stretch) > number {
            stretch -= 1;
        }
        while start(stretch + 1) <= number {
            stretch += 1;
        }
        let length = start(stretch + 1) - start(stretch);
        number == start(stretch) + mix(self.key, stretch) % length
    }
}

/// Cuts one text, given in pieces of whole lines, into documents.
pub struct Cutter<F> {
    unit: Unit,
    /// The split of the next document.
    next: F,
    /// The document that has begun.
    open: Option<Split>,
    /// Whether there was a line with text, and whether the last one was blank after that: for documents between blank lines.
    has_text: bool,
    after_blank: bool,
    /// Bytes of text so far.
    place: u64,
    /// Whether a document that lacks a newline at its end is given one, so that the next does not run into it.
    completes: bool,
}

impl<F: FnMut() -> Split> Cutter<F> {
    /// Begins a text.
    pub fn new(unit: Unit, completes: bool, next: F) -> Self {
        let completes = completes && matches!(unit, Unit::Documents(_));
        Self { unit, next, open: None, has_text: false, after_blank: false, place: 0, completes }
    }

    /// The next piece, whose first byte is at `place` of the file.
    pub fn cut<'a>(&mut self, text: &'a str, place: u64) -> Vec<Event<'a>> {
        self.place = place;
        let mut events = Vec::new();
        let mut start = 0;
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            if self.begins(line) {
                if let Some(open) = self.open {
                    events.extend(self.piece(open, &text[start..at]));
                    events.push(Event::End(open));
                }
                start = at;
                self.open = Some(self.split());
            }
            at += line.len();
            self.place += line.len() as u64;
        }
        if let Some(open) = self.open {
            events.extend(self.piece(open, &text[start..]));
        }
        events
    }

    /// The end of the text.
    pub fn finish(self) -> Option<Event<'static>> {
        self.open.map(Event::End)
    }

    fn piece<'a>(&self, split: Split, text: &'a str) -> Option<Event<'a>> {
        // Only the last line of a file can lack its newline, and a document ends there.
        let text = match self.completes && !text.ends_with('\n') && !text.is_empty() {
            true => Cow::Owned(format!("{text}\n")),
            false => Cow::Borrowed(text),
        };
        (!text.is_empty()).then_some(Event::Text(split, text))
    }

    /// Whether a document begins with this line.
    fn begins(&mut self, line: &str) -> bool {
        match self.unit {
            Unit::Documents(Documents::BlankLine) => {
                let is_blank = line.trim().is_empty();
                let begins = self.open.is_none() || self.after_blank && !is_blank;
                self.has_text |= !is_blank;
                self.after_blank = self.has_text && is_blank;
                begins
            }
            _ if self.open.is_none() => true,
            Unit::Documents(Documents::Line) => true,
            Unit::Cut(_) => self.open != Some(self.part()),
            _ => false,
        }
    }

    fn split(&mut self) -> Split {
        match self.unit {
            Unit::Cut(_) => self.part(),
            _ => (self.next)(),
        }
    }

    /// The part of a text that is cut in three, by its place.
    fn part(&self) -> Split {
        match self.unit {
            Unit::Cut([_, test]) if self.place >= test => Split::Test,
            Unit::Cut([valid, _]) if self.place >= valid => Split::Valid,
            _ => Split::Train,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The documents of a text and their splits, joined from the pieces that lines `width` at a time give.
    fn documents(unit: Documents, text: &str, width: usize) -> Vec<String> {
        let mut cutter = Cutter::new(Unit::Documents(unit), true, || Split::Train);
        let (mut all, mut document) = (Vec::new(), String::new());
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let pieces: Vec<String> = lines.chunks(width).map(|lines| lines.concat()).collect();
        for piece in &pieces {
            for event in cutter.cut(piece, 0) {
                match event {
                    Event::Text(_, text) => document.push_str(&text),
                    Event::End(_) => all.push(std::mem::take(&mut document)),
                }
            }
        }
        assert_eq!(cutter.finish().is_some(), !document.is_empty());
        all.extend((!document.is_empty()).then_some(document));
        all
    }

    #[test]
    fn documents_end_where_they_should_however_the_text_comes() {
        let text = "\n\n a\nb\n\n \nc\n\nd";
        for width in 1..9 {
            assert_eq!(documents(Documents::BlankLine, text, width), ["\n\n a\nb\n\n \n", "c\n\n", "d\n"], "{width}");
            assert_eq!(documents(Documents::File, text, width), ["\n\n a\nb\n\n \nc\n\nd\n"]);
            let lines = documents(Documents::Line, text, width);
            assert_eq!((lines.len(), lines.concat()), (9, format!("{text}\n")));
        }
    }

    #[test]
    fn each_stretch_of_documents_sets_one_aside() {
        for (valid, test) in [(0.05, 0.05), (0.5, 0.25), (0.01, 0.0), (0.3, 0.3), (0.999, 0.0), (1.0 / 3.0, 1.0 / 7.0)]
        {
            let mut sorter = Sorter::new([valid, test]);
            let splits: Vec<Split> = (0..21_000).map(|_| sorter.sort()).collect();
            let count = |split| splits.iter().filter(|&&other| other == split).count() as f64;
            assert!((count(Split::Valid) - 21_000.0 * valid).abs() < 2.0, "{valid} {test}");
            assert!((count(Split::Test) - 21_000.0 * test).abs() < 2.0, "{valid} {test}");
        }
        // Every twenty documents have one, and not at the same place.
        let mut sorter = Sorter::new([0.05, 0.0]);
        let places: Vec<usize> = (0..50)
            .map(|_| {
                let stretch: Vec<Split> = (0..20).map(|_| sorter.sort()).collect();
                stretch.iter().position(|&split| split == Split::Valid).unwrap()
            })
            .collect();
        assert!(places.iter().max().unwrap() - places.iter().min().unwrap() > 10, "{places:?}");
    }
}
