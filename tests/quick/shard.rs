//! Shards: what is written is read back, and all damage is reported.

use std::fs;
use std::path::{Path, PathBuf};

use lockstep::data::shard::{Counts, Shard, ShardWriter};
use lockstep::error::exit_code;
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::common::in_memory;

const DIGEST: [u8; 32] = [7; 32];
const HEADER: usize = 128;

fn write(path: &Path, vocab_size: usize, lines: &[Vec<u32>]) -> Counts {
    let mut writer = ShardWriter::create(path, vocab_size, DIGEST).unwrap();
    for line in lines {
        writer.write_line(line, 2).unwrap();
    }
    writer.finish().unwrap().0
}

/// Three lines of a vocabulary whose ids take two or four bytes; the second line is empty.
fn small(folder: &TempDir, vocab_size: usize) -> PathBuf {
    let path = folder.path().join("small.bin");
    write(&path, vocab_size, &[vec![1, 2, 3], vec![], vec![4, 299]]);
    path
}

/// Corrects the checksum of changed bytes, as an attacker would.
fn seal(bytes: &mut [u8]) {
    let mut hash = Sha256::new();
    hash.update(&bytes[HEADER..]);
    hash.update(&bytes[..72]);
    hash.update(&bytes[104..HEADER]);
    bytes[72..104].copy_from_slice(&hash.finalize());
}

/// Opening must fail as a data error that names the file, the place, both values and the remedy.
fn refused(path: &Path, bytes: &[u8], field: &str) -> String {
    fs::write(path, bytes).unwrap();
    let error = Shard::open(path).expect_err(field);
    assert_eq!(exit_code(&error), 3, "{error}");
    let text = error.to_string();
    for part in [path.to_str().unwrap(), field, "at byte", "expected", "found", "lockstep prepare"] {
        assert!(text.contains(part), "{part:?} in {text:?}");
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_written_is_read(
        wide in any::<bool>(),
        lines in prop::collection::vec(prop::collection::vec(any::<u32>(), 0..20), 0..30),
    ) {
        let vocab_size = if wide { 100_000 } else { 65_536 };
        let lines: Vec<Vec<u32>> =
            lines.into_iter().map(|line| line.into_iter().map(|id| id % vocab_size).collect()).collect();
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("x.bin");
        let counts = write(&path, vocab_size as usize, &lines);
        let shard = Shard::open(&path).unwrap();
        prop_assert_eq!(shard.counts(), counts);
        prop_assert_eq!(shard.n_lines(), lines.len());
        prop_assert_eq!(shard.n_words(), 2 * lines.len() as u64);
        prop_assert_eq!(shard.n_tokens(), lines.iter().map(Vec::len).sum::<usize>());
        prop_assert_eq!(shard.vocab_size(), vocab_size as usize);
        prop_assert_eq!(shard.tokenizer_digest(), DIGEST);
        let mut all = Vec::new();
        let mut places = Vec::new();
        shard.for_each_line(|line| places.push(line)).unwrap();
        prop_assert_eq!(places.len(), lines.len());
        for (place, line) in places.into_iter().zip(&lines) {
            let mut ids = Vec::new();
            shard.tokens(place, &mut ids).unwrap();
            prop_assert_eq!(&ids, &line.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
            all.extend(ids);
        }
        let mut whole = Vec::new();
        shard.tokens(0..shard.n_tokens(), &mut whole).unwrap();
        prop_assert_eq!(whole, all);
        // Nothing but the shard is left behind.
        prop_assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn every_truncation_is_caught() {
    let folder = in_memory();
    for vocab_size in [300, 70_000] {
        let path = small(&folder, vocab_size);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            refused(&path, &whole[..length], "");
        }
        refused(&path, &[&whole[..], &[0]].concat(), "count");
    }
}

#[test]
fn every_flipped_bit_is_caught() {
    let folder = in_memory();
    for vocab_size in [300, 70_000] {
        let path = small(&folder, vocab_size);
        let mut bytes = fs::read(&path).unwrap();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            refused(&path, &bytes, "");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn a_valid_checksum_does_not_excuse_wrong_content() {
    let folder = TempDir::new().unwrap();
    let path = small(&folder, 300);
    let whole = fs::read(&path).unwrap();
    // 5 ids of 2 bytes, 6 bytes of padding, 4 offsets.
    let (padding, offsets) = (HEADER + 10, HEADER + 16);
    let changed = |at: usize, new: &[u8], field: &str| {
        let mut bytes = whole.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        seal(&mut bytes);
        refused(&path, &bytes, field)
    };
    changed(0, b"PK", "magic");
    changed(8, &2u32.to_le_bytes(), "format version at byte 8: expected 1, found 2");
    changed(12, &4u32.to_le_bytes(), "token width");
    changed(104, &70_000u32.to_le_bytes(), "token width");
    changed(127, &[1], "reserved byte at byte 127");
    for count in [6, u64::MAX, u64::MAX / 2, u64::MAX / 8] {
        // Six ids give the same file size; only the last line offset reveals them.
        let field = if count == 6 { "offset of line 4 at byte 168: expected 6" } else { "count" };
        changed(16, &count.to_le_bytes(), field);
    }
    for count in [0, 4, u64::MAX, u64::MAX / 8] {
        changed(24, &count.to_le_bytes(), "count");
    }
    changed(padding, &[1], "padding at byte 138");
    changed(offsets, &1u64.to_le_bytes(), "offset of line 1 at byte 144: expected 0 to 0, found 1");
    changed(offsets + 16, &2u64.to_le_bytes(), "offset of line 3 at byte 160: expected 3 to 5, found 2");
    changed(offsets + 16, &u64::MAX.to_le_bytes(), "offset of line 3");
    changed(offsets + 24, &4u64.to_le_bytes(), "offset of line 4");
    changed(HEADER + 2, &300u16.to_le_bytes(), "token id at byte 130: expected an id below 300, found 300");
    // Unchanged, it opens: `seal` agrees with the writer.
    let mut bytes = whole.clone();
    seal(&mut bytes);
    assert_eq!(bytes, whole);
}

#[test]
fn a_file_that_is_cut_while_it_is_in_use_is_named() {
    let folder = TempDir::new().unwrap();
    let path = small(&folder, 300);
    let shard = Shard::open(&path).unwrap();
    let cut = |length| fs::File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
    let read = || shard.tokens(0..5, &mut Vec::new());
    // The remaining part can still be read.
    cut(HEADER as u64 + 10);
    read().unwrap();
    cut(HEADER as u64 + 9);
    for error in [read().unwrap_err(), shard.for_each_line(|_| ()).unwrap_err()] {
        assert_eq!(exit_code(&error), 3, "{error}");
        let expected = format!("{}: expected 176 bytes, as when it was opened, found 137", path.display());
        assert!(error.to_string().contains(&expected), "{error}");
    }
}

#[test]
fn a_file_that_is_changed_while_it_is_in_use_is_named() {
    let folder = TempDir::new().unwrap();
    let path = small(&folder, 300);
    let shard = Shard::open(&path).unwrap();
    shard.check_unchanged().unwrap();
    // The same size, and even the same content: who wrote cannot be trusted to have written only that.
    let bytes = fs::read(&path).unwrap();
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    while fs::metadata(&path).unwrap().modified().unwrap() == before {
        fs::write(&path, &bytes).unwrap();
    }
    let error = shard.check_unchanged().unwrap_err();
    assert_eq!(exit_code(&error), 3, "{error}");
    let expected = format!("{}: expected the file as it was when it was opened", path.display());
    assert!(error.to_string().contains(&expected), "{error}");
    // Another file in its place is another file: this one is still there, and whole.
    let shard = Shard::open(&path).unwrap();
    let other = folder.path().join("other.bin");
    fs::write(&other, &bytes[..130]).unwrap();
    fs::rename(&other, &path).unwrap();
    shard.check_unchanged().unwrap();
    shard.verify().unwrap();
}

#[test]
fn a_writer_that_does_not_finish_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("x.bin");
    let mut writer = ShardWriter::create(&path, 300, DIGEST).unwrap();
    let error = writer.write_line(&[1, 300], 2).expect_err("an id outside the vocabulary");
    assert_eq!(exit_code(&error), 3);
    assert!(error.to_string().contains("token id 300 on line 1"), "{error}");
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_a_storage_error() {
    let folder = TempDir::new().unwrap();
    // Every write to /dev/full fails as on a full disk.
    std::os::unix::fs::symlink("/dev/full", folder.path().join("x.bin.tmp")).unwrap();
    let path = folder.path().join("x.bin");
    let mut writer = ShardWriter::create(&path, 300, DIGEST).unwrap();
    writer.write_line(&[1], 1).unwrap();
    let error = writer.finish().expect_err("a full disk");
    assert_eq!(exit_code(&error), 4, "{error}");
    assert!(error.to_string().contains("free space"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_shard_is_shared_between_threads() {
    fn shareable<T: Send + Sync>() {}
    shareable::<Shard>();
}
