//! Who started this process: `mpirun`, `srun` or a person; as which rank of how many; in which of Slurm's jobs. The
//! environment says so, and MPI changes it when it starts: it is to be read before.

use std::env;

/// Who starts ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Starter {
    /// Open MPI's mpirun, of this version if it says so.
    OpenMpi(Option<String>),
    /// The mpirun of MPICH and its relatives.
    Hydra,
    /// Slurm, as a task of a job's step.
    Srun,
    /// A person or a script.
    Hand,
}

/// How this process was started, as far as the environment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    #[allow(missing_docs)]
    pub by: Starter,
    /// This process's number among those started together.
    pub rank: Option<usize>,
    /// Its number among those on its node.
    pub local_rank: Option<usize>,
    /// How many were started together.
    pub world_size: Option<usize>,
    /// How many of them are on this node; for Slurm's tasks that is not asked.
    pub local_size: Option<usize>,
    /// The nodes of a Slurm step.
    pub nodes: Option<usize>,
    /// What the processes find each other through, with its version: PMIx or PMI.
    pub manager: Option<String>,
}

impl Launch {
    /// Reads this process's environment.
    pub fn from_environment() -> Self {
        Self::read(|name| env::var(name).ok())
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| get(name)?.parse::<usize>().ok();
        let (by, rank, local_rank, world_size, local_size);
        // mpirun's variables outrank Slurm's: inside a job those describe mpirun's daemon.
        if let Some(ranks) = number("OMPI_COMM_WORLD_SIZE") {
            by = Starter::OpenMpi(get("OMPI_VERSION"));
            (rank, local_rank) = (number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_LOCAL_RANK"));
            (world_size, local_size) = (Some(ranks), number("OMPI_COMM_WORLD_LOCAL_SIZE"));
        } else if let Some(here) = number("MPI_LOCALNRANKS") {
            by = Starter::Hydra;
            (rank, local_rank) = (number("PMI_RANK"), number("MPI_LOCALRANKID"));
            (world_size, local_size) = (number("PMI_SIZE").or(Some(here)), Some(here));
        } else if let (Some(tasks), Some(task)) = (number("SLURM_STEP_NUM_TASKS"), number("SLURM_PROCID")) {
            by = Starter::Srun;
            (rank, local_rank) = (Some(task), number("SLURM_LOCALID"));
            (world_size, local_size) = (Some(tasks), None);
        } else {
            by = Starter::Hand;
            (rank, local_rank) = (number("PMIX_RANK").or_else(|| number("PMI_RANK")), None);
            // The step's size counts, not SLURM_NTASKS, which batch shells carry too.
            (world_size, local_size) = (number("PMI_SIZE").or_else(|| number("SLURM_STEP_NUM_TASKS")), None);
        }
        let version = get("PMIX_VERSION").map(|version| format!(" {version}")).unwrap_or_default();
        let managers = [
            ("PMIX_RANK", format!("PMIx{version}")),
            ("PMI_FD", "PMI (through the socket PMI_FD)".into()),
            ("PMI_RANK", "PMI (PMI_RANK)".into()),
            ("PMI_SIZE", "PMI (PMI_SIZE)".into()),
        ];
        Self {
            by,
            rank,
            local_rank,
            world_size,
            local_size,
            nodes: number("SLURM_STEP_NUM_NODES"),
            manager: managers.into_iter().find_map(|(name, text)| get(name).map(|_| text)),
        }
    }

    /// Whether this is, or may be, one of several ranks: MPI must be started.
    pub fn is_joined(&self) -> bool {
        matches!(self.by, Starter::OpenMpi(_)) || self.manager.is_some() || self.world_size.is_some_and(|n| n > 1)
    }

    /// Whether the ranks are spread over several nodes.
    pub fn has_several_nodes(&self) -> bool {
        match (self.world_size, self.local_size) {
            (Some(all), Some(here)) => here < all,
            _ => self.by == Starter::Srun && self.nodes.is_some_and(|n| n > 1),
        }
    }
}

/// Whether a variable tells a process of its place among others. A process without any of them is a world of one, whoever
/// started its parent.
pub fn is_variable(name: &str) -> bool {
    const PREFIXES: [&str; 7] = ["PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDRA_", "MPI_LOCAL", "SLURM_"];
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The Slurm job that this process is part of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlurmJob {
    /// The cluster: two may share a file system.
    pub cluster: Option<String>,
    #[allow(missing_docs)]
    pub id: String,
    /// The job's place in an array: `ARRAY_ELEMENT`.
    pub array: Option<String>,
    /// How often Slurm has queued the job again.
    pub restarts: u64,
}

impl SlurmJob {
    /// Reads this process's environment.
    pub fn from_environment() -> Option<Self> {
        Self::read(|name| env::var(name).ok())
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Option<Self> {
        // They go into files and onto terminals.
        let get = |name: &str| get(name).filter(|text| text.len() <= 256 && !text.chars().any(char::is_control));
        Some(Self {
            id: get("SLURM_JOB_ID")?,
            cluster: get("SLURM_CLUSTER_NAME"),
            array: get("SLURM_ARRAY_JOB_ID").zip(get("SLURM_ARRAY_TASK_ID")).map(|(job, task)| format!("{job}_{task}")),
            restarts: get("SLURM_RESTART_COUNT").and_then(|count| count.parse().ok()).unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &str) -> Launch {
        Launch::read(lookup(variables))
    }

    /// Variables as `NAME=VALUE`, spaces between them.
    fn lookup(variables: &str) -> impl Fn(&str) -> Option<String> + '_ {
        move |name| {
            let mut pairs = variables.split(' ').filter_map(|pair| pair.split_once('='));
            pairs.find_map(|(key, value)| (key == name).then(|| value.to_owned()))
        }
    }

    #[test]
    fn a_process_without_a_launcher_is_alone() {
        // A batch shell, and a shell inside an allocation, are no ranks, whatever the job asked for.
        for variables in ["", "SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0"] {
            assert!(!launch(variables).is_joined(), "{variables}");
        }
    }

    #[test]
    fn each_starter_is_known_by_its_variables() {
        let srun = "SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NUM_NODES=2 SLURM_PROCID=3 SLURM_LOCALID=1";
        let task = launch(srun);
        assert_eq!(
            (&task.by, task.rank, task.local_rank, task.world_size),
            (&Starter::Srun, Some(3), Some(1), Some(4))
        );
        assert!(task.is_joined() && task.has_several_nodes() && task.manager.is_none());

        // Inside a job, Slurm's variables describe mpirun's daemon.
        let open = format!(
            "{srun} OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_VERSION=5.0.11 PMIX_RANK=1"
        );
        let rank = launch(&open);
        assert_eq!(rank.by, Starter::OpenMpi(Some("5.0.11".into())));
        assert_eq!((rank.rank, rank.world_size, rank.has_several_nodes()), (Some(1), Some(2), false));
        assert_eq!(rank.manager.as_deref(), Some("PMIx"));

        let hydra = launch(&format!("{srun} MPI_LOCALNRANKS=2 MPI_LOCALRANKID=0 PMI_RANK=2 PMI_SIZE=4 PMI_FD=5"));
        assert_eq!((&hydra.by, hydra.rank, hydra.world_size), (&Starter::Hydra, Some(2), Some(4)));
        assert!(hydra.has_several_nodes());
    }

    #[test]
    fn a_task_alone_that_has_a_manager_starts_mpi() {
        assert!(launch("PMIX_RANK=0 SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0").is_joined());
    }

    #[test]
    fn a_job_is_read_and_what_no_terminal_should_show_is_not() {
        let job =
            SlurmJob::read(lookup("SLURM_JOB_ID=9 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=2 SLURM_RESTART_COUNT=3"));
        let job = job.unwrap();
        assert_eq!((job.id.as_str(), job.array.as_deref(), job.restarts), ("9", Some("7_2"), 3));
        assert_eq!(SlurmJob::read(lookup("SLURM_ARRAY_JOB_ID=7")), None);
        assert_eq!(SlurmJob::read(lookup("SLURM_JOB_ID=\u{1b}[2J")), None);
    }

    #[test]
    fn only_a_launchers_variables_are_its_own() {
        let own = ["PMIX_RANK", "PMI_FD", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"];
        assert!(own.iter().all(|name| is_variable(name)));
        let others = ["PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OPAL_PREFIX", "CUDA_VISIBLE_DEVICES"];
        assert!(!others.iter().any(|name| is_variable(name)));
    }
}
