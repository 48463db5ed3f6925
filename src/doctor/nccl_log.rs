//! NCCL's own log: the only place where it says which network and which transport it chose.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

/// The file that NCCL writes its log to, removed when dropped.
pub struct NcclLog(Option<PathBuf>);

impl NcclLog {
    /// Asks NCCL for a log. To be called before NCCL is loaded, which reads these variables once; a log that the user has
    /// sent elsewhere is left alone.
    pub fn ask() -> Self {
        if std::env::var_os("NCCL_DEBUG_FILE").is_some() {
            return Self(None);
        }
        let path = std::env::temp_dir().join(format!("lockstep-doctor-{}-nccl.log", std::process::id()));
        std::env::set_var("NCCL_DEBUG", "INFO");
        std::env::set_var("NCCL_DEBUG_FILE", &path);
        Self(Some(path))
    }

    /// (network with its interface, transports) of this rank; "unknown" if the log does not say.
    pub fn read(&self) -> (String, String) {
        let text = self.0.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let (network, transports) = parse(&text);
        (network.unwrap_or_else(|| "unknown".into()), transports.unwrap_or_else(|| "unknown".into()))
    }
}

impl Drop for NcclLog {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

fn parse(text: &str) -> (Option<String>, Option<String>) {
    let network = text.lines().find_map(|line| {
        let (before, using) = line.split_once(": Using ").or_else(|| line.split_once(" Using "))?;
        let kind = ["NET/IB", "NET/Socket", "NET/OFI"].into_iter().find(|kind| before.contains(kind))?;
        Some(format!("{kind} {}", using.trim()))
    });
    let transports: BTreeSet<&str> = text
        .lines()
        .filter(|line| line.contains(" Channel "))
        .filter_map(|line| line.split_once(" via ")?.1.split_whitespace().next())
        .collect();
    let transports: Vec<&str> = transports.into_iter().collect();
    (network, (!transports.is_empty()).then(|| transports.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn network_and_transports_are_read_and_never_invented() {
        let text = "n1:9:11 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.1<0>\n\
                    n1:9:11 [0] NCCL INFO NET/IB : No device found.\n\
                    n1:9:11 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>\n\
                    n1:9:11 [0] NCCL INFO Using network Socket\n\
                    n1:9:12 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM\n\
                    n1:9:12 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM\n\
                    n1:9:12 [0] NCCL INFO Channel 00/0 : 3[0] -> 0[0] [receive] via NET/Socket/0\n";
        let (network, transports) = parse(text);
        assert_eq!(network.as_deref(), Some("NET/Socket [0]eth0:10.0.0.1<0>"));
        assert_eq!(transports.as_deref(), Some("NET/Socket/0, P2P/CUMEM"));
        let ib = "n1:9:11 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB ib0:10.1.0.1<0>\n";
        assert_eq!(parse(ib).0.as_deref(), Some("NET/IB [0]mlx5_0:1/IB [RO]; OOB ib0:10.1.0.1<0>"));
        assert_eq!(parse("n1:9:11 [0] NCCL INFO NET/IB : No device found.\nvia nothing\n"), (None, None));
    }
}
