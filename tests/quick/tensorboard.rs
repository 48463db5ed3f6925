//! `train.tensorboard`: the event files hold what the CSVs hold, and say which steps are done again.
//! `tests/full/tensorboard.rs` reads them with TensorBoard itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{numbers, Workspace};

/// The event files of a run, in TensorBoard's order.
fn event_files(run: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(run).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        paths.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents.")).collect();
    files.sort();
    files
}

/// The data of each record of an event file.
fn records(path: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(path).unwrap();
    let (mut rest, mut found) = (&bytes[..], Vec::new());
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        found.push(rest[12..12 + length].to_vec());
        rest = &rest[12 + length + 4..];
    }
    found
}

/// A protocol buffer's fields: number, and content as bytes.
fn fields(mut data: &[u8]) -> Vec<(u8, Vec<u8>)> {
    fn varint(data: &mut &[u8]) -> u64 {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = data[0];
            *data = &data[1..];
            number |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return number;
            }
        }
    }
    let mut found = Vec::new();
    while !data.is_empty() {
        let key = varint(&mut data);
        let length = match key & 7 {
            0 => {
                found.push(((key >> 3) as u8, varint(&mut data).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            5 => 4,
            _ => varint(&mut data) as usize,
        };
        found.push(((key >> 3) as u8, data[..length].to_vec()));
        data = &data[length..];
    }
    found
}

/// What a file holds: the first step that it tells a reader to forget, and each tag's steps and values.
fn read(path: &Path) -> (u64, BTreeMap<String, Vec<(u64, f32)>>) {
    let (mut start, mut curves) = (0, BTreeMap::<String, Vec<(u64, f32)>>::new());
    for record in records(path) {
        let event: BTreeMap<u8, Vec<u8>> = fields(&record).into_iter().collect();
        let step = event.get(&2).map_or(0, |step| u64::from_le_bytes(step[..].try_into().unwrap()));
        if event.contains_key(&7) {
            start = step;
        }
        for (_, value) in event.get(&5).map(|summary| fields(summary)).unwrap_or_default() {
            let value: BTreeMap<u8, Vec<u8>> = fields(&value).into_iter().collect();
            let tag = String::from_utf8(value[&1].clone()).unwrap();
            curves.entry(tag).or_default().push((step, f32::from_le_bytes(value[&2][..].try_into().unwrap())));
        }
    }
    (start, curves)
}

#[test]
fn event_files_hold_what_the_csvs_hold_and_which_steps_are_done_again() {
    let work = Workspace::new();
    let train = |more: &str| work.train("run", &format!("--set train.tensorboard=true {more}"));
    train("").ok();
    let run = work.path("run");
    for step in [8, 12] {
        fs::remove_dir_all(run.join(format!("checkpoints/step-{step:08}"))).unwrap();
    }
    train("").ok();
    let files = event_files(&run);
    let [(first, of_first), (second, of_second)] = [read(&files[0]), read(&files[1])];
    assert_eq!((files.len(), first, second), (2, 1, 5));
    for (column, after, curves) in [("loss", 0, &of_first), ("loss", 4, &of_second), ("lr", 4, &of_second)] {
        let expected = numbers(&run.join("train.csv"), column).into_iter().enumerate().skip(after);
        let expected: Vec<(u64, f32)> = expected.map(|(row, value)| (row as u64 + 1, value as f32)).collect();
        assert_eq!(curves[&format!("train/{column}")], expected, "{column}");
    }
    let steps = |curves: &BTreeMap<String, Vec<(u64, f32)>>| -> Vec<u64> {
        curves["valid/ppl"].iter().map(|(step, _)| *step).collect()
    };
    assert_eq!((steps(&of_first), steps(&of_second)), (vec![4, 8, 12], vec![8, 12]));
    // Neither a step's number nor a text is a curve.
    let tags: Vec<&String> = of_first.keys().collect();
    assert!(tags.iter().all(|tag| !tag.ends_with("/step") && !tag.ends_with("/split")), "{tags:?}");
    // Without the key there is no such file.
    work.trained("plain");
    assert_eq!(event_files(&work.path("plain")).len(), 0);
}
