//! Archives over HTTP: cut, resumed, refused. The server is one thread of this process on 127.0.0.1.

use std::fs;
use std::io::{Cursor, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lockstep::data::corpus::Choices;
use lockstep::data::download::fetch;
use lockstep::data::folder::DataDir;
use lockstep::data::prepare::prepare;
use lockstep::data::wikitext::{Archive, Source};
use lockstep::error::exit_code;
use lockstep::files::hex;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::ZipWriter;

/// How the server answers one request.
#[derive(Clone, Copy)]
struct Reply {
    /// The status of an answer without a body; with None it answers like a web server.
    status: Option<u16>,
    /// Whether a range is heeded.
    ranges: bool,
    /// The connection is cut after this many bytes of the body.
    cut: usize,
}

const WHOLE: Reply = Reply { status: None, ranges: true, cut: usize::MAX };

fn cut(bytes: usize) -> Reply {
    Reply { cut: bytes, ..WHOLE }
}

fn status(code: u16) -> Reply {
    Reply { status: Some(code), ..WHOLE }
}

struct Server {
    url: String,
    thread: JoinHandle<Vec<String>>,
}

impl Server {
    /// Answers one connection for each reply, then closes. It ends by itself after some minutes.
    fn start(body: &[u8], replies: &[Reply]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}/corpus.zip", listener.local_addr().unwrap());
        let (body, replies) = (body.to_vec(), replies.to_vec());
        let thread = std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(300);
            let mut heads = Vec::new();
            while heads.len() < replies.len() && Instant::now() < deadline {
                match listener.accept() {
                    Ok((stream, _)) => heads.push(answer(stream, &body, replies[heads.len()])),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
            heads
        });
        Self { url, thread }
    }

    /// The heads of the requests so far, in lower case.
    fn requests(self) -> Vec<String> {
        self.thread.join().unwrap()
    }
}

fn answer(mut stream: TcpStream, body: &[u8], reply: Reply) -> String {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let asked = head.lines().find_map(|line| line.strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok());
    let (code, start) = match (reply.status, asked) {
        (Some(code), _) => (code, body.len()),
        (None, Some(start)) if reply.ranges && start < body.len() => (206, start),
        (None, Some(_)) if reply.ranges => (416, body.len()),
        _ => (200, 0),
    };
    let rest = &body[start..];
    let range = match code {
        206 => format!("Content-Range: bytes {start}-{}/{}\r\n", body.len() - 1, body.len()),
        _ => String::new(),
    };
    let length = rest.len();
    write!(stream, "HTTP/1.1 {code} X\r\nContent-Length: {length}\r\n{range}Connection: close\r\n\r\n").unwrap();
    stream.write_all(&rest[..reply.cut.min(length)]).unwrap();
    head
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn zip_of(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, text) in entries {
        match name.strip_suffix('@') {
            Some(link) => zip.add_symlink(link, *text, SimpleFileOptions::default()).unwrap(),
            None => {
                zip.start_file(*name, SimpleFileOptions::default()).unwrap();
                zip.write_all(text.as_bytes()).unwrap();
            }
        }
    }
    zip.finish().unwrap().into_inner()
}

const TEXT: &str = " = A title = \n \n Some words , and more of them . \n";

/// A small archive with WikiText-2's layout.
fn corpus() -> Vec<u8> {
    let train = TEXT.repeat(50);
    zip_of(&[
        ("wikitext-2/wiki.train.tokens", &train),
        ("wikitext-2/wiki.valid.tokens", TEXT),
        ("wikitext-2/wiki.test.tokens", TEXT),
    ])
}

fn fails<T>(result: anyhow::Result<T>, code: u8, parts: &[&str]) -> String {
    let error = result.err().expect("an error");
    let text = format!("{error:#}");
    assert_eq!(exit_code(&error), code, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} in {text:?}");
    }
    text
}

fn target(folder: &TempDir) -> (PathBuf, PathBuf) {
    (folder.path().join("sub/x.zip"), folder.path().join("sub/x.zip.part"))
}

#[test]
fn a_whole_file_takes_one_request() {
    let (folder, body) = (TempDir::new().unwrap(), corpus());
    let (to, part) = target(&folder);
    let server = Server::start(&body, &[WHOLE]);
    fetch(&server.url, &sha256(&body), &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), body);
    assert!(!part.exists());
    // A second call finds it and sends no request.
    fetch(&server.url, &sha256(&body), &to).unwrap();
    let requests = server.requests();
    assert_eq!(requests.len(), 1);
    assert!(requests[0].contains("user-agent: lockstep/"), "{}", requests[0]);
}

#[test]
fn a_cut_connection_is_resumed_where_it_ended() {
    let (folder, body) = (TempDir::new().unwrap(), corpus());
    let (to, _) = target(&folder);
    let server = Server::start(&body, &[cut(100), status(503), cut(50), WHOLE]);
    fetch(&server.url, &sha256(&body), &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), body);
    let ranges: Vec<bool> = server.requests().iter().map(|head| head.contains("range: bytes=")).collect();
    assert_eq!(ranges, [false, true, true, true]);
}

#[test]
fn a_server_without_ranges_starts_afresh() {
    let (folder, body) = (TempDir::new().unwrap(), corpus());
    let (to, _) = target(&folder);
    let whole = Reply { ranges: false, ..WHOLE };
    let server = Server::start(&body, &[Reply { cut: 100, ..whole }, whole]);
    fetch(&server.url, &sha256(&body), &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), body);
    assert!(server.requests()[1].contains("range: bytes=100-"));
}

#[test]
fn what_arrived_before_giving_up_is_resumed_by_the_next_run() {
    let (folder, body) = (TempDir::new().unwrap(), corpus());
    let (to, part) = target(&folder);
    let server = Server::start(&body, &[cut(60), cut(0), cut(20), cut(0), cut(0)]);
    let url = server.url.clone();
    fails(fetch(&url, &sha256(&body), &to), 3, &[&url, "80 bytes are kept", part.to_str().unwrap(), "--source"]);
    assert_eq!(server.requests().len(), 5);
    assert_eq!(fs::read(&part).unwrap(), &body[..80]);

    let server = Server::start(&body, &[WHOLE]);
    fetch(&server.url, &sha256(&body), &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), body);
    assert!(server.requests()[0].contains("range: bytes=80-"));
}

#[test]
fn a_complete_part_needs_no_byte_more() {
    let (folder, body) = (TempDir::new().unwrap(), corpus());
    let (to, part) = target(&folder);
    fs::create_dir(part.parent().unwrap()).unwrap();
    fs::write(&part, &body).unwrap();
    let server = Server::start(&body, &[WHOLE]);
    fetch(&server.url, &sha256(&body), &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), body);
}

#[test]
fn a_wrong_checksum_is_refused_and_not_resumed() {
    let (folder, body) = (TempDir::new().unwrap(), corpus());
    let (to, part) = target(&folder);
    fs::create_dir(part.parent().unwrap()).unwrap();
    // The partial file is the beginning of another file.
    fs::write(&part, [0; 90]).unwrap();
    let server = Server::start(&body, &[WHOLE, WHOLE]);
    let sum = sha256(&body);
    fails(fetch(&server.url, &sum, &to), 3, &[&server.url, &sum, "found", "--url"]);
    assert!(!to.exists() && !part.exists());
    fetch(&server.url, &sum, &to).unwrap();
    assert!(!server.requests()[1].contains("range:"));
}

#[test]
fn a_refusal_or_an_address_that_is_none_is_not_tried_again() {
    let folder = TempDir::new().unwrap();
    let (to, _) = target(&folder);
    let server = Server::start(b"", &[status(403)]);
    fails(fetch(&server.url, "", &to), 3, &[&server.url, "expected status 200, found 403", "--url", "--source"]);
    assert_eq!(server.requests().len(), 1);
    fails(fetch("no address", "", &to), 2, &["--url no address", "http"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing arrived, nothing is left");
}

#[test]
fn a_published_name_keeps_its_checksum_whatever_the_mirror() {
    let (folder, body) = (TempDir::new().unwrap(), corpus());
    let server = Server::start(&body, &[WHOLE]);
    let source = Source::parse(&["wikitext-2".into()], Some(&server.url), &Choices::default()).unwrap();
    let published = "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c";
    let out = folder.path().join("out");
    fails(prepare(&source, &Choices::default(), "bpe:270", &out), 3, &[&server.url, published, &sha256(&body)]);
    assert!(!out.exists());
}

fn published(body: &[u8], url: &str) -> Source {
    Source::Published(Archive { name: "wikitext-2".to_owned(), url: url.to_owned(), sha256: sha256(body) })
}

fn prepare_from(body: &[u8], out: &Path) -> anyhow::Result<()> {
    let server = Server::start(body, &[WHOLE]);
    prepare(&published(body, &server.url), &Choices::default(), "bpe:270", out).map(|_| ())
}

#[test]
fn an_archive_becomes_a_data_folder_and_goes() {
    let (folder, body) = (TempDir::new().unwrap(), corpus());
    let out = folder.path().join("out");
    prepare_from(&body, &out).unwrap();
    let data = DataDir::open(&out).unwrap();
    assert_eq!(data.meta.source, "wikitext-2");
    assert_eq!((data.meta.train.lines, data.meta.train.words), (150, 50 * 12));
    assert_eq!(data.meta.valid.bytes, TEXT.len() as u64);
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["out"]);
}

#[test]
fn entries_that_try_to_escape_are_refused_by_name() {
    let cases = [
        ("../evil.txt", "points out of its folder"),
        ("wikitext-2/../../evil.txt", "points out of its folder"),
        ("wikitext-2\\..\\..\\evil.txt", "points out of its folder"),
        ("/evil.txt", "absolute path"),
        ("C:\\evil.txt", "absolute path"),
        ("wikitext-2/evil@", "symbolic link"),
    ];
    for (name, reason) in cases {
        let body = zip_of(&[
            ("wikitext-2/wiki.train.tokens", TEXT),
            ("wikitext-2/wiki.valid.tokens", TEXT),
            ("wikitext-2/wiki.test.tokens", TEXT),
            (name, "/etc/passwd"),
        ]);
        let folder = TempDir::new().unwrap();
        let out = folder.path().join("a/b/out");
        let name = format!("{:?}", name.trim_end_matches('@'));
        fails(prepare_from(&body, &out), 3, &[&name, reason, "--url"]);
        let outside: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(outside, ["a"], "{name}");
        assert!(!out.exists());
    }
}

#[test]
fn an_archive_that_is_not_what_it_says_is_refused() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let body = corpus();
    fails(prepare_from(&body[..body.len() / 2], &out), 3, &["cannot read", "wikitext-2.zip"]);
    let lacking = zip_of(&[("wikitext-2/wiki.train.tokens", TEXT), ("wikitext-2/wiki.valid.tokens", TEXT)]);
    fails(prepare_from(&lacking, &out), 3, &["wikitext-2/wiki.test.tokens"]);
    let empty = zip_of(&[
        ("wikitext-2/wiki.train.tokens", TEXT),
        ("wikitext-2/wiki.valid.tokens", ""),
        ("wikitext-2/wiki.test.tokens", TEXT),
    ]);
    fails(prepare_from(&empty, &out), 3, &["wikitext-2/wiki.valid.tokens", "not a single word"]);

    // The declared size is 24 bytes into an entry of the central directory, and the CRC 16.
    let start = body.windows(4).position(|four| four == b"PK\x01\x02").unwrap();
    for (at, new, reason) in [(24, 10u32, "declared"), (24, u32::MAX - 1, "expected at most"), (16, 7, "checksum")] {
        let mut lying = body.clone();
        lying[start + at..start + at + 4].copy_from_slice(&new.to_le_bytes());
        fails(prepare_from(&lying, &out), 3, &["wikitext-2/wiki.train.tokens", reason]);
    }
    assert!(!out.exists());
}
