//! What one rank knows of itself, sent to all the others.

use std::fs;

use serde::{Deserialize, Serialize};
use tch::{Cuda, Device};

use super::network::{self, Interface};
use crate::comm::Comm;
use crate::error::Result;
use crate::host;
use crate::torch::{self, Driver, Gpu};

/// A rank's place, its share of its node, and what its libraries are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    pub rank: usize,
    pub local_rank: usize,
    pub host: String,
    /// The cores it may use, as Linux lists them: 0-3,8.
    pub cores: String,
    pub threads: usize,
    /// What it computes on: a GPU, or the CPU; or why not.
    pub gpu: std::result::Result<Option<Gpu>, String>,
    /// Why it computes on the CPU of a machine with a driver, although a GPU would do.
    pub unused_gpu: Option<String>,
    pub visible_gpus: String,
    /// NCCL's name for the node, if one is given.
    pub host_id: Option<String>,
    pub libtorch: String,
    pub cuda: String,
    pub nccl: std::result::Result<String, String>,
    pub mpi: Option<String>,
    pub binary: String,
    pub digest: String,
    pub interfaces: Vec<Interface>,
    /// Variables that choose networks, as NAME=VALUE.
    pub choices: Vec<String>,
    /// What NCCL's own choice gets wrong.
    pub wrong_for_nccl: Option<String>,
}

impl Facts {
    /// This rank's facts, and the device that it would train on.
    ///
    /// # Errors
    /// As [`torch::set_threads`].
    pub fn collect(comm: &Comm, wanted: &str) -> Result<(Self, Device)> {
        let libraries = comm.libraries();
        let threads = torch::set_threads(None)?;
        let device = torch::select(wanted, comm.local_rank).map_err(|e| format!("{e:#}"));
        let unused_gpu = match device {
            Ok(Device::Cpu) if wanted == "auto" && torch::has_driver() => {
                torch::select("cuda", comm.local_rank).err().map(|e| format!("{e:#}"))
            }
            _ => None,
        };
        let gpu = match &device {
            Ok(Device::Cuda(index)) => torch::gpu(*index).map(Some),
            Ok(_) => Ok(None),
            Err(reason) => Err(reason.clone()),
        };
        let variable = |name: &str| std::env::var(name).ok();
        let interfaces = network::interfaces();
        let wrong_for_nccl = variable(network::NCCL_INTERFACE)
            .filter(|choice| network::chosen_by_nccl(choice, &interfaces).is_empty())
            .map(|choice| format!("{}={choice} names no interface of this node", network::NCCL_INTERFACE));
        let choices = [network::MPI_INCLUDE, "OMPI_MCA_btl_tcp_if_exclude", network::NCCL_INTERFACE];
        let (binary, digest) = host::binary().unwrap_or_else(|e| (format!("unknown ({e})"), "unknown".into()));
        let facts = Self {
            rank: comm.rank,
            local_rank: comm.local_rank,
            host: libraries.host.unwrap_or_else(host::name),
            cores: cores(),
            threads,
            gpu,
            cuda: cuda(&device, unused_gpu.as_deref()),
            unused_gpu,
            visible_gpus: variable("CUDA_VISIBLE_DEVICES").unwrap_or_else(|| "not set".into()),
            host_id: variable("NCCL_HOSTID"),
            libtorch: torch::libtorch_version(),
            nccl: libraries.nccl,
            mpi: libraries.mpi,
            binary,
            digest,
            interfaces,
            choices: choices.iter().filter_map(|name| Some(format!("{name}={}", variable(name)?))).collect(),
            wrong_for_nccl,
        };
        Ok((facts, device.unwrap_or(Device::Cpu)))
    }

    /// How the rank is called in a sentence.
    pub fn name(&self) -> String {
        format!("rank {} on {}", self.rank, self.host)
    }

    /// The numbers of its cores.
    pub fn core_numbers(&self) -> Vec<usize> {
        numbers(&self.cores)
    }
}

fn cores() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    found.map_or("unknown", str::trim).to_string()
}

/// The numbers in a list such as 0-3,8.
fn numbers(list: &str) -> Vec<usize> {
    let span = |word: &str| {
        let (start, end) = word.split_once('-').unwrap_or((word, word));
        Some(start.trim().parse().ok()?..=end.trim().parse().ok()?)
    };
    list.split(',').filter_map(span).flatten().collect()
}

/// What LibTorch has of CUDA in this process.
fn cuda(device: &std::result::Result<Device, String>, unused: Option<&str>) -> String {
    if let Some(reason) = unused {
        return format!("cannot be used: {reason}");
    }
    match device {
        Ok(Device::Cuda(_)) => {
            let version = tch::utils::version_cudart();
            let runtime = format!("libtorch_cuda loaded, CUDA {}.{}", version / 1000, version % 1000 / 10);
            format!("{runtime}, driver {}, GPUs visible: {}", driver(), Cuda::device_count())
        }
        Ok(_) => match torch::driver() {
            Driver::Absent(reason) => format!("not used: {reason}"),
            _ => format!("not used: --device cpu (driver {})", driver()),
        },
        Err(reason) => format!("cannot be used: {reason}"),
    }
}

/// The version of NVIDIA's kernel module.
fn driver() -> String {
    torch::driver_module().unwrap_or_else(|| "unknown".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_read() {
        assert_eq!(numbers("0-3,8"), [0, 1, 2, 3, 8]);
        assert_eq!(numbers("5"), [5]);
        assert!(numbers("unknown").is_empty());
        assert!(!numbers(&cores()).is_empty(), "this machine: {}", cores());
    }
}
