//! Points in a device's work, to wait for and to time by.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};
use tch::Device;

use crate::error::{Error, Result};

/// Makes marks on one device.
#[derive(Clone)]
pub struct Marks(Option<Arc<CudaStream>>);

/// A point in the work that a device was given: all before it is done once the mark is reached.
///
/// A CPU computes at once, so its marks are reached when they are made. On a GPU a mark is an event on the stream on which
/// LibTorch computes.
pub enum Mark {
    /// When it was made.
    Cpu(Instant),
    /// CUDA's event.
    Gpu(CudaEvent),
}

impl Marks {
    /// # Errors
    /// Communication, if the GPU does not answer.
    pub fn on(device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else { return Ok(Self(None)) };
        // The primary context and the legacy default stream: LibTorch's.
        let context = CudaContext::new(index).map_err(|e| failed("opening the GPU", &e))?;
        Ok(Self(Some(context.default_stream())))
    }

    /// A mark after all that the device was given so far.
    ///
    /// # Errors
    /// Communication, if the GPU has failed.
    pub fn mark(&self) -> Result<Mark> {
        let Some(stream) = &self.0 else { return Ok(Mark::Cpu(Instant::now())) };
        let event = stream.record_event(Some(CU_EVENT_DEFAULT)).map_err(|e| failed("recording an event", &e))?;
        Ok(Mark::Gpu(event))
    }
}

impl Mark {
    /// Whether the device has come so far; does not wait.
    ///
    /// # Errors
    /// Communication, if the GPU has failed.
    pub fn is_reached(&self) -> Result<bool> {
        match self {
            Self::Cpu(_) => Ok(true),
            Self::Gpu(event) => event.try_is_complete().map_err(|e| failed("computing", &e)),
        }
    }

    /// Milliseconds on the device from an earlier mark to this one, both of them reached.
    ///
    /// # Errors
    /// Communication, if the GPU has failed.
    pub fn ms_since(&self, earlier: &Self) -> Result<f64> {
        match (earlier, self) {
            (Self::Gpu(from), Self::Gpu(to)) => {
                from.elapsed_ms(to).map(f64::from).map_err(|e| failed("timing a step", &e))
            }
            (Self::Cpu(from), Self::Cpu(to)) => Ok((*to - *from).as_secs_f64() * 1000.0),
            _ => unreachable!("marks of two devices"),
        }
    }
}

fn failed(what: &str, error: &DriverError) -> anyhow::Error {
    Error::Communication(format!("CUDA: {what}: {error}")).into()
}
