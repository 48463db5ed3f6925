//! `lockstep doctor` on jobs of several ranks, healthy or with an injected fault: each fault is named, with its remedy.

use std::fs;
use std::process::{Command, Stdio};

use crate::common::{binary, finish, not_run, snapshot, Workspace};

/// The command that examines ranks through `launch/local`; each becomes `lockstep` after running the script `rank`.
fn ranks(work: &Workspace, ranks: usize, rank: &str) -> Command {
    let rank = format!("rank=\"$OMPI_COMM_WORLD_RANK$PMI_RANK\"\n{rank}\nexec {} \"$@\"", binary());
    let mut command = Command::new("timeout");
    command.arg("600").arg(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/local"));
    command.args([&ranks.to_string(), "doctor", "--device", "cpu"]).current_dir(work.path(""));
    command.env("LOCKSTEP_BIN", work.script("rank", &rank)).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

#[test]
fn ranks_that_are_well_can_train() {
    for n in 2..=3 {
        let work = Workspace::new();
        let said = finish(ranks(&work, n, "")).ok();
        said.reports(&["PMI         PMI", "linked MPI  /", "fp32", "verdict:    this job can train"]);
        said.reports(&[&format!("{n} of {n} ranks see rank 0's file there, and rank 0 sees theirs")]);
        assert!(!work.path("runs").exists());
        let rows = |columns: usize| {
            let rows = said.stdout.lines().map(|line| line.split_whitespace().map(String::from).collect::<Vec<_>>());
            rows.filter(move |row| row.len() == columns)
        };
        let layout: Vec<String> = rows(6).filter(|row| row[5] == "cpu").map(|row| row[0].clone()).collect();
        assert_eq!(layout, (0..n).map(|rank| rank.to_string()).collect::<Vec<_>>(), "{}", said.stdout);
        // bytes, ms, algbw, busbw
        let sums: Vec<Vec<f64>> = rows(6)
            .filter(|row| row[0] == "fp32")
            .map(|row| row[2..].iter().map(|x| x.parse().unwrap()).collect())
            .collect();
        assert_eq!(sums.iter().map(|row| row[0] as u64).collect::<Vec<_>>(), [4, 4_000_012, 1 << 20, 16 << 20]);
        let last = &sums[3];
        // Both are printed with three decimals.
        assert!((last[0] / last[1] / 1e6 - last[2]).abs() < 0.001 + 0.02 * last[2], "algbw is bytes by time: {last:?}");
        let busbw = last[2] * 2.0 * (n as f64 - 1.0) / n as f64;
        assert!((busbw - last[3]).abs() < 0.002, "busbw is algbw * 2(n-1)/n: {last:?}");
    }
}

#[test]
fn another_binary_on_one_rank_is_named() {
    let work = Workspace::new();
    let rank = format!("[ $rank = 1 ] && cp {} other && printf x >>other && exec ./other \"$@\"", binary());
    let said = finish(ranks(&work, 3, &rank)).fails(6, &["another binary"]);
    said.reports(&["fault:      rank 1 on ", "with another binary (by SHA-256) than rank 0", "remedy: build once"]);
    said.reports(&["verdict:    this job cannot train: 1 fault"]);
}

#[test]
fn a_rank_without_the_shared_folder_is_named() {
    let work = Workspace::new();
    // As on a node on which the path is a different folder.
    let rank = "mkdir -p elsewhere/runs runs; [ $rank = 1 ] && cd elsewhere";
    let said = finish(ranks(&work, 2, rank)).fails(6, &["does not see"]);
    let place = work.path("elsewhere/runs").canonicalize().unwrap();
    let fault = format!(": does not see in {} what rank 0 wrote there: No such file", place.display());
    said.reports(&["1 of 2 ranks see rank 0's file", "fault:      rank 1 on ", &fault, "remedy: name a folder"]);
    for folder in ["runs", "elsewhere/runs"] {
        assert!(snapshot(&work.path(folder)).is_empty(), "the probe left something in {folder}");
    }
}

#[test]
fn a_rank_that_may_not_write_is_named() {
    let work = Workspace::new();
    fs::create_dir(work.path("runs")).unwrap();
    let mount = "mount --bind runs runs && mount -o remount,bind,ro runs";
    let permitted = Command::new("unshare").args(["--mount", "sh", "-c", mount]).current_dir(work.path("")).status();
    if !permitted.is_ok_and(|status| status.success()) {
        return not_run("mounting a folder read-only in a namespace of its own is not permitted here");
    }
    let rank =
        format!("[ $rank = 1 ] && exec unshare --mount sh -c '{mount} && cd . && exec {} \"$@\"' sh \"$@\"", binary());
    let said = finish(ranks(&work, 2, &rank)).fails(6, &["cannot write there"]);
    said.reports(&["fault:      rank 1 on ", "but cannot write there: Read-only file system", "remedy: name a folder"]);
    assert!(snapshot(&work.path("runs")).is_empty());
}

#[test]
fn a_wrong_interface_is_named_before_mpi_ends_the_job() {
    let work = Workspace::new();
    if !finish(ranks(&work, 2, "")).ok().stdout.contains("mpirun of Open MPI") {
        return not_run("the variable is Open MPI's, and this is another MPI");
    }
    let mut command = ranks(&work, 2, "");
    command.env("OMPI_MCA_btl_tcp_if_include", "nosuch0").env("OMPI_MCA_btl", "self,tcp");
    let said = finish(command).fails(6, &["OMPI_MCA_btl_tcp_if_include=nosuch0"]);
    said.reports(&["OMPI_MCA_btl_tcp_if_include=nosuch0 names no interface of this node; it has "]);
    said.reports(&["remedy: set OMPI_MCA_btl_tcp_if_include to the interface"]);
    // If the ranks share a node's memory, it does no harm.
    let mut command = ranks(&work, 2, "");
    command.env("OMPI_MCA_btl_tcp_if_include", "nosuch0");
    finish(command).ok().reports(&["warning:    on ", "nosuch0 names no interface", "this job can train"]);
}

#[test]
fn a_rank_that_never_comes_is_given_up_at_the_deadline() {
    let work = Workspace::new();
    let mut command = ranks(&work, 2, "[ $rank = 1 ] && exec sleep 1000");
    command.args(["--deadline-s", "3"]);
    let said = finish(command).fails(6, &["starting MPI took longer than 3 s"]);
    said.reports(&["fault:      starting MPI took longer", "remedy:", "this job cannot train"]);
}
