//! The collectives themselves, on one to four real ranks: every size, every kind of tensor, every way of cutting.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lockstep::comm::{even_parts, Comm, Deadlines, Join};
use lockstep::torch;
use tch::{Device, Kind, Tensor};

/// Odd sizes, none, one, fewer elements than ranks, and more than one exchange can carry (4 Mi).
const SIZES: [i64; 9] = [0, 1, 2, 3, 5, 63, 4097, 1_000_003, (1 << 22) + 7];

/// Starts this test binary again as `ranks` ranks, each of which runs the test `name` below.
fn as_ranks(ranks: usize, name: &str) -> std::process::Output {
    let folder = tempfile::tempdir().unwrap();
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/local"))
        .arg(ranks.to_string())
        .args(["--exact", &format!("collectives::{name}"), "--ignored", "--nocapture", "--test-threads=1"])
        .env("LOCKSTEP_BIN", std::env::current_exe().unwrap())
        .env("OMP_NUM_THREADS", "1")
        .env("SHARED_FOLDER", folder.path())
        .output()
        .unwrap()
}

fn passes(ranks: usize, name: &str) {
    let output = as_ranks(ranks, name);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{ranks} ranks: {text}{}", String::from_utf8_lossy(&output.stderr));
    let passed = text.matches("1 passed").count();
    assert_eq!(passed, ranks, "{ranks} ranks: {text}");
}

#[test]
fn sums_parts_and_copies_are_right_for_one_to_four_ranks() {
    for ranks in 1..=4 {
        passes(ranks, "a_rank_checks_every_collective");
    }
}

#[test]
fn what_is_small_reaches_every_rank_in_few_messages() {
    for ranks in [1, 2, 3, 5, 8] {
        passes(ranks, "a_rank_checks_what_is_small");
    }
}

#[test]
fn sums_are_added_in_the_order_of_the_ranks() {
    for ranks in 2..=4 {
        passes(ranks, "a_rank_checks_the_order_of_sums");
    }
}

#[test]
fn a_rank_that_does_not_come_is_given_up_at_the_deadline() {
    passes(2, "a_rank_gives_up_before_the_other_comes");
}

#[test]
fn what_cannot_be_summed_is_refused_before_it_is_sent() {
    passes(2, "a_rank_refuses_other_types");
}

/// NCCL's part. It runs if there is a GPU, with up to four ranks on it.
#[test]
fn gpus_sum_every_type_for_one_to_four_ranks() {
    if let Err(reason) = torch::select("cuda", 0) {
        eprintln!("NOT RUN: gpus_sum_every_type_for_one_to_four_ranks: {reason}");
        return;
    }
    for ranks in [1, 2, 4] {
        passes(ranks, "a_rank_checks_nccl");
    }
}

#[test]
fn a_missing_nccl_is_said_and_no_panic() {
    let comm = Comm::start(deadlines(600)).unwrap();
    match comm.libraries().nccl {
        Ok(version) => assert!(version.split('.').all(|part| part.parse::<u32>().is_ok()), "{version}"),
        Err(reason) => assert!(reason.contains("libnccl.so") && reason.contains("launch/setup --cuda"), "{reason}"),
    }
}

fn deadlines(step: u64) -> Deadlines {
    let step = Duration::from_secs(step);
    Deadlines { startup: Duration::from_secs(600), step, save: step }
}

/// Small whole numbers: every order of adding gives the same sum.
fn numbers(rank: usize, size: i64) -> Tensor {
    (Tensor::arange(size, (Kind::Float, Device::Cpu)).remainder(1000.0) + rank as f64).to_kind(Kind::Float)
}

#[test]
#[ignore = "one rank of a test above"]
fn a_rank_checks_every_collective() {
    let comm = Comm::start(deadlines(600)).unwrap();
    let (n, rank) = (comm.world_size, comm.rank);
    for size in SIZES {
        let sum = (0..n).fold(Tensor::zeros([size], (Kind::Float, Device::Cpu)), |sum, rank| sum + numbers(rank, size));

        let mut found = numbers(rank, size);
        comm.all_reduce(&mut found).unwrap();
        assert_eq!(found, sum, "all-reduce of {size}");

        let mut found = numbers(rank, size);
        comm.broadcast(&mut found).unwrap();
        assert_eq!(found, numbers(0, size), "broadcast of {size}");

        let all = size as usize;
        let uneven: Vec<usize> = (0..=n).map(|r| if r == n { all } else { all.min(r * r * 3) }).collect();
        let last_has_all: Vec<usize> = (0..=n).map(|r| if r == n { all } else { 0 }).collect();
        for bounds in [even_parts(all, n), uneven, last_has_all] {
            let part =
                |tensor: &Tensor| tensor.narrow(0, bounds[rank] as i64, (bounds[rank + 1] - bounds[rank]) as i64);
            let found = numbers(rank, size);
            comm.begin_reduce_scatter(&found, &bounds).unwrap();
            comm.complete().unwrap();
            assert_eq!(part(&found), part(&sum), "reduce-scatter of {size} at {bounds:?}");

            let found = Tensor::full([size], -1.0, (Kind::Float, Device::Cpu));
            part(&found).copy_(&part(&sum));
            comm.begin_all_gather(&found, &bounds).unwrap();
            comm.complete().unwrap();
            assert_eq!(found, sum, "all-gather of {size} at {bounds:?}");

            let found = Tensor::full([size], -1.0, (Kind::BFloat16, Device::Cpu));
            part(&found).copy_(&part(&sum));
            comm.begin_all_gather(&found, &bounds).unwrap();
            comm.complete().unwrap();
            assert_eq!(found, sum.to_kind(Kind::BFloat16), "all-gather of {size} in bf16 at {bounds:?}");
        }
    }

    // Several in flight at once, some of them empty, in slices of one tensor.
    let flat = numbers(rank, 10_000);
    for (start, length) in [(0, 10), (10, 0), (10, 4990), (5000, 0), (5000, 5000)] {
        comm.begin_all_reduce(&flat.narrow(0, start, length)).unwrap();
    }
    comm.complete().unwrap();
    let mut whole = numbers(rank, 10_000);
    comm.all_reduce(&mut whole).unwrap();
    assert_eq!(flat, whole);

    comm.barrier(comm.deadlines.step).unwrap();
}

#[test]
#[ignore = "one rank of a test above"]
fn a_rank_checks_what_is_small() {
    let comm = Comm::start(deadlines(600)).unwrap();
    let (n, rank) = (comm.world_size, comm.rank);
    assert_eq!((comm.node, comm.nodes, comm.local_rank), (0, 1, rank));
    // 0 for one rank, 1 for two, 3 for five to eight.
    let most = u64::from(n.next_power_of_two().trailing_zeros());
    let sent = std::cell::Cell::new(comm.messages());
    let few = |what: &str, times: u64| {
        let now = comm.messages();
        assert!(now - sent.replace(now) <= times * most, "{what}: rank {rank} of {n}");
    };

    let numbers = |rank: usize| vec![rank as f64, 0.5];
    let all: Vec<Vec<f64>> = (0..n).map(numbers).collect();
    assert_eq!(comm.gather(&numbers(rank)).unwrap(), all);
    few("gather", 1);
    assert_eq!(comm.gather(&[]).unwrap(), vec![Vec::<f64>::new(); n]);
    few("gather of nothing", 1);
    assert_eq!(comm.gather_text(&"x".repeat(rank)).unwrap(), (0..n).map(|rank| "x".repeat(rank)).collect::<Vec<_>>());
    few("gather of text", 2);
    comm.barrier(comm.deadlines.step).unwrap();
    few("barrier", 1);
    assert!(comm.any(rank + 1 == n).unwrap() && !comm.any(false).unwrap());
    few("any", 2);

    let last = (n - 1) as f64;
    let nan_but_on_the_last = if rank + 1 == n { -3.0 } else { f64::NAN };
    let mine = [rank as f64, rank as f64, nan_but_on_the_last, if rank == 0 { f64::NAN } else { 1.0 }];
    let joins = [Join::Sum, Join::Most, Join::Most, Join::Sum];
    let (joined, notes) = comm.reduce(&mine, &joins, &numbers(rank)).unwrap();
    few("reduce", 1);
    assert_eq!(joined[..3], [last * n as f64 / 2.0, last, -3.0]);
    assert!(joined[3].is_nan());
    assert_eq!(notes, if rank == 0 { all.concat() } else { Vec::new() });

    // Of numbers that no float holds: every rank has the bits of every other, and long lists arrive whole.
    let long: Vec<f64> = (1..=20_000).map(|place| 0.1 * place as f64 * (rank + 1) as f64).collect();
    let sums = comm.sum(&long).unwrap();
    few("a long sum", 1);
    let times = (n * (n + 1) / 2) as f64;
    assert!((1..=20_000).zip(&sums).all(|(place, sum)| (sum / (0.1 * f64::from(place) * times) - 1.0).abs() < 1e-12));
    assert!(comm.gather(&sums[..100]).unwrap().iter().all(|theirs| theirs[..] == sums[..100]));
}

/// 1 + 2^-24 is 1 in fp32, so the sum shows the order of adding.
#[test]
#[ignore = "one rank of a test above"]
fn a_rank_checks_the_order_of_sums() {
    let comm = Comm::start(deadlines(600)).unwrap();
    let tiny = f32::EPSILON / 2.0;
    for large in 0..comm.world_size {
        let value = |rank: usize| if rank == large { 1.0 } else { tiny };
        let expected = (1..comm.world_size).fold(value(0), |sum, rank| sum + value(rank));
        let mut found = Tensor::full([100_001], f64::from(value(comm.rank)), (Kind::Float, Device::Cpu));
        comm.all_reduce(&mut found).unwrap();
        let found = [found.min(), found.max()].map(|end| end.double_value(&[]) as f32);
        assert_eq!(found.map(f32::to_bits), [expected.to_bits(); 2], "{large}");
    }
}

#[test]
#[ignore = "one rank of a test above"]
fn a_rank_gives_up_before_the_other_comes() {
    let comm = Comm::start(deadlines(1)).unwrap();
    let given_up = PathBuf::from(std::env::var_os("SHARED_FOLDER").unwrap()).join("given up");
    if comm.rank == 1 {
        while !given_up.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
    } else {
        let error = comm.barrier(comm.deadlines.step).unwrap_err();
        assert_eq!(lockstep::error::exit_code(&error), 6);
        assert!(error.to_string().contains("longer than 1 s"), "{error}");
        std::fs::write(given_up, "").unwrap();
    }
    // The other rank arrives late after all, and both exit normally.
    if comm.rank == 1 {
        comm.barrier(comm.deadlines.startup).unwrap();
    }
}

#[test]
#[ignore = "one rank of a test above"]
fn a_rank_refuses_other_types() {
    let comm = Comm::start(deadlines(600)).unwrap();
    for kind in [Kind::BFloat16, Kind::Half, Kind::Double, Kind::Int64] {
        let error = comm.begin_all_reduce(&Tensor::zeros([4], (kind, Device::Cpu))).unwrap_err();
        assert!(error.to_string().contains(&format!("{kind:?}")), "{error}");
    }
    let strided = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)).narrow(1, 0, 2);
    assert!(comm.begin_all_reduce(&strided).is_err());
    let flat = Tensor::zeros([4], (Kind::Float, Device::Cpu));
    for bounds in [vec![0, 4], vec![0, 2, 5], vec![1, 2, 4], vec![0, 5, 4]] {
        assert!(comm.begin_reduce_scatter(&flat, &bounds).is_err(), "{bounds:?}");
        assert!(comm.begin_all_gather(&flat, &bounds).is_err(), "{bounds:?}");
    }
    // Nothing was sent, so the next collective finds its peers in step.
    assert_eq!(comm.sum(&[1.0]).unwrap(), [2.0]);
}

#[test]
#[ignore = "one rank of a test above"]
fn a_rank_checks_nccl() {
    // NCCL refuses two ranks on one GPU of one host. Each gets its own host name, and they meet over the loopback.
    std::env::set_var("NCCL_HOSTID", format!("host-{}", std::env::var("OMPI_COMM_WORLD_RANK").unwrap()));
    std::env::set_var("NCCL_NET", "Socket");
    std::env::set_var("NCCL_SOCKET_IFNAME", "lo");
    let mut comm = Comm::start(deadlines(600)).unwrap();
    let gpu = torch::select("cuda", 0).unwrap();
    comm.use_device(gpu).unwrap();
    let (n, rank) = (comm.world_size, comm.rank);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double, Kind::Int, Kind::Int64] {
        for size in SIZES {
            // Whole numbers up to 8 ranks x 30, exact in bf16.
            let mine =
                |rank: usize| (Tensor::arange(size, (Kind::Int64, gpu)).remainder(16) + rank as i64).to_kind(kind);
            let sum = (0..n).fold(Tensor::zeros([size], (kind, gpu)), |sum, rank| sum + mine(rank));
            let mut found = mine(rank);
            comm.all_reduce(&mut found).unwrap();
            assert_eq!(found, sum, "all-reduce of {size} {kind:?}");
            let mut found = mine(rank);
            comm.broadcast(&mut found).unwrap();
            assert_eq!(found, mine(0), "broadcast of {size} {kind:?}");
            let all = size as usize;
            let even = (0..=n).map(|r| all / n * r).collect::<Vec<_>>();
            for bounds in [even_parts(all, n), even] {
                let length = bounds[n] as i64;
                let part =
                    |tensor: &Tensor| tensor.narrow(0, bounds[rank] as i64, (bounds[rank + 1] - bounds[rank]) as i64);
                let found = mine(rank).narrow(0, 0, length);
                comm.begin_reduce_scatter(&found, &bounds).unwrap();
                comm.complete().unwrap();
                assert_eq!(part(&found), part(&sum), "reduce-scatter of {length} {kind:?}");
                let found = Tensor::zeros([length], (kind, gpu));
                part(&found).copy_(&part(&sum));
                comm.begin_all_gather(&found, &bounds).unwrap();
                comm.complete().unwrap();
                assert_eq!(found, sum.narrow(0, 0, length), "all-gather of {length} {kind:?}");
            }
        }
    }
    let refused = comm.begin_all_reduce(&Tensor::zeros([4], (Kind::Bool, gpu))).unwrap_err();
    assert!(refused.to_string().contains("Bool"), "{refused}");
}
