//! Stands in for MPI in a binary built without it: one process works, several are refused.

use std::time::Duration;

use tch::Tensor;

use super::Join;
use crate::error::{Error, Result};

/// Never constructed: [`World::start`] is the only way to one, and it fails.
pub struct World {
    never: std::convert::Infallible,
    pub rank: usize,
    pub local_rank: usize,
    pub world_size: usize,
    pub node: usize,
    pub nodes: usize,
    pub library: String,
    pub host: String,
}

pub fn library() -> Option<String> {
    None
}

impl World {
    pub fn start(_: Duration) -> Result<Self> {
        Err(Error::Communication(
            "a launcher started this process as one of several, but this binary was built without MPI; build it with \
             the default features, or start one process"
                .into(),
        )
        .into())
    }

    pub fn begin_all_reduce(&self, _: &Tensor) -> Result<()> {
        match self.never {}
    }

    pub fn begin_reduce_scatter(&self, _: &Tensor, _: &[usize]) -> Result<()> {
        match self.never {}
    }

    pub fn begin_all_gather(&self, _: &Tensor, _: &[usize]) -> Result<()> {
        match self.never {}
    }

    pub fn begin_broadcast(&self, _: &Tensor) -> Result<()> {
        match self.never {}
    }

    pub fn complete(&self, _: Duration) -> Result<()> {
        match self.never {}
    }

    pub fn reduce(&self, _: &[f64], _: &[Join], _: &[f64], _: Duration) -> Result<(Vec<f64>, Vec<f64>)> {
        match self.never {}
    }

    pub fn gather(&self, _: &[f64], _: Duration) -> Result<Vec<Vec<f64>>> {
        match self.never {}
    }

    pub fn broadcast_bytes(&self, _: &[u8], _: Duration) -> Result<Vec<u8>> {
        match self.never {}
    }

    pub fn sent(&self) -> u64 {
        match self.never {}
    }

    pub fn abort(&self, _: u8) -> ! {
        match self.never {}
    }
}
