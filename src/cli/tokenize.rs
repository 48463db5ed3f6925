//! `lockstep tokenize`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use super::print::taken;
use crate::data::wikitext::MARK;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// Prints the ids of each line of text, or the text of each line of ids.
pub fn tokenize(tokenizer: &str, decode: bool, file: Option<&Path>) -> Result<()> {
    let tokenizer = match tokenizer {
        "gpt2" => Tokenizer::gpt2()?,
        path if Path::new(path).is_file() => Tokenizer::from_file(Path::new(path))?,
        name => {
            let message = format!("--tokenizer {name}: expected gpt2 or a tokenizer.json; there is no such file");
            return Err(Error::Usage(message).into());
        }
    };
    let (input, name): (Box<dyn BufRead>, String) = match file {
        Some(path) => {
            let file = File::open(path).map_err(|e| Error::read(path, e))?;
            (Box::new(BufReader::new(file)), path.display().to_string())
        }
        None => (Box::new(io::stdin().lock()), "standard input".into()),
    };
    let mut output = BufWriter::new(io::stdout().lock());
    let mut offset = 0;
    for (number, line) in input.split(b'\n').enumerate() {
        let bytes = line.map_err(|e| Error::read(Path::new(&name), e))?;
        let line = String::from_utf8(bytes).map_err(|e| {
            let at = offset + e.utf8_error().valid_up_to();
            Error::Data(format!("{name}: not UTF-8 at byte {at}; convert the text to UTF-8"))
        })?;
        offset += line.len() + 1;
        let line = match line.strip_prefix(MARK) {
            Some(rest) if number == 0 => {
                tracing::info!("{name} begins with a byte order mark, which is left out");
                rest.to_owned()
            }
            _ => line,
        };
        let written = if decode {
            let text = parse_ids(&line).and_then(|ids| tokenizer.decode(&ids));
            output.write_all(&text.map_err(|e| e.context(format!("{name}, line {}", number + 1)))?)
        } else {
            let ids: Vec<String> = tokenizer.encode(&line).iter().map(ToString::to_string).collect();
            output.write_all(ids.join(" ").as_bytes())
        };
        if !taken(written.and_then(|()| output.write_all(b"\n")))? {
            return Ok(());
        }
    }
    taken(output.flush()).map(drop)
}

fn parse_ids(line: &str) -> Result<Vec<u32>> {
    line.split_whitespace()
        .map(|word| {
            word.parse().map_err(|_| Error::Data(format!("expected token ids between spaces, found `{word}`")).into())
        })
        .collect()
}
