//! Who started this process, and through what MPI could find the others. Read before MPI starts, which sets variables of
//! its own, and which may end the process if it is started wrongly.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::network::{self, Interface, MPI_INCLUDE};
use super::reach::{Finding, Meeting};
use super::report::{Place, Report};
use crate::host;
use crate::launcher::{Launch, SlurmJob, Starter};
use crate::patience::within;

/// How this rank was started, and what MPI will meet.
pub struct Job {
    launch: Launch,
}

impl Job {
    pub fn from_environment() -> Self {
        Self { launch: Launch::from_environment() }
    }

    pub fn describe(&self, report: &mut Report) {
        let Launch { by, world_size, nodes, .. } = &self.launch;
        let ranks = world_size.unwrap_or(1);
        let launcher = match by {
            Starter::OpenMpi(version) => {
                let version = version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
                format!("mpirun of Open MPI{version}, ranks: {ranks}")
            }
            Starter::Hydra => format!("mpirun of MPICH's family (Hydra), ranks: {ranks}"),
            Starter::Srun => format!("srun, tasks: {ranks}, nodes: {}", nodes.unwrap_or(1)),
            Starter::Hand if ranks > 1 => format!("a Slurm step, tasks: {ranks}"),
            Starter::Hand => "none: started by hand".into(),
        };
        report.row("launcher", &launcher);
        report.row("PMI", self.launch.manager.as_deref().unwrap_or("none"));
        report.row("linked MPI", &linked_mpi().unwrap_or_else(|| "none in this binary".into()));
    }

    /// Whether this is the first process, as far as the launcher says.
    pub fn is_first(&self) -> bool {
        self.launch.rank.unwrap_or(0) == 0
    }

    /// What is wrong with the networks that MPI would take. Open MPI would end the job itself, inside its initialisation.
    pub fn check_networks(&self, run_dir: &Path, report: &mut Report) {
        if self.launch.manager.is_none() {
            return;
        }
        let several_nodes = self.launch.has_several_nodes();
        let choice = std::env::var(MPI_INCLUDE).ok();
        let all = network::interfaces();
        let mut found = Vec::new();
        let wrong = choice.as_ref().and_then(|choice| network::wrong_for_mpi(choice, &all, several_nodes));
        if let Some(wrong) = wrong {
            let what = format!("on {}: {wrong}; it has {}", host::name(), network::describe(&all));
            // Ranks on one node share its memory, unless they are told not to.
            found.push(Finding { is_fault: several_nodes || !btl("sm") && !btl("vader"), what });
        }
        if let Some(meeting) = self.meeting(run_dir) {
            let taken: Vec<&Interface> = match &choice {
                Some(choice) => network::chosen_by_mpi(choice, &all),
                None => all.iter().filter(|interface| !interface.is_loopback()).collect(),
            };
            found = meeting.hold(&host::name(), &taken, choice.is_some() && found.is_empty(), found);
        }
        for Finding { is_fault, what } in found {
            let unset = if choice.is_some() { ", or unset it" } else { "" };
            let remedy = format!(
                "set {MPI_INCLUDE} to the interface or the network (10.1.0.0/16, say) that joins the nodes{unset}; \
                 launch/rank finds it in most Slurm jobs"
            );
            match is_fault {
                true => report.fault(Place::Peers, what, remedy),
                false => {
                    // At once, too: MPI may leave no time for a report.
                    if self.is_first() {
                        tracing::warn!("{what}; {remedy}");
                    }
                    report.warn(what, remedy);
                }
            }
        }
    }

    /// Where the ranks can meet before MPI starts: several nodes, on which MPI may use TCP.
    fn meeting(&self, run_dir: &Path) -> Option<Meeting> {
        let (rank, ranks) = (self.launch.rank?, self.launch.world_size?);
        let restarts = std::env::var("SLURM_RESTART_COUNT").unwrap_or_default();
        let job = format!("{} {restarts}", std::env::var("PMIX_NAMESPACE").ok()?);
        (self.launch.has_several_nodes() && btl("tcp")).then(|| Meeting::new(run_dir, &job, rank, ranks))
    }

    /// Says what comes next, on one rank: MPI may end the process itself, or be stuck for as long as it is waited for.
    pub fn announce(&self, deadline: Duration) {
        if self.is_first() && self.launch.manager.is_some() {
            tracing::info!(
                "joining the ranks through MPI; if that fails without a report within {} s, {}",
                deadline.as_secs(),
                network_remedy()
            );
        }
    }

    /// What to do if MPI does not join the ranks.
    pub fn remedy(&self, place: Place) -> String {
        if place == Place::Peers {
            return network_remedy();
        }
        let refused =
            self.launch.manager.as_ref().map(|pmi| format!("the linked MPI does not take {pmi}; ")).unwrap_or_default();
        let offered = SlurmJob::from_environment().and_then(|_| offered_by_srun());
        let pmix = offered.iter().flatten().find(|name| name.starts_with("pmix"));
        refused
            + &match (offered.as_ref(), pmix) {
                (_, Some(pmix)) => format!("start the ranks with `srun --mpi={pmix}`, which this Slurm has"),
                (Some(types), None) => format!(
                    "this Slurm has no PMIx (`srun --mpi=list`: {}); start the ranks with mpirun inside the job",
                    types.join(", ")
                ),
                (None, None) => "start the ranks with `srun --mpi=pmix`, or with the mpirun of the linked MPI".into(),
            }
    }
}

/// Whether Open MPI may use this one of its transports.
fn btl(name: &str) -> bool {
    let list = std::env::var("OMPI_MCA_btl").unwrap_or_default();
    let (all_but, names) = list.strip_prefix('^').map_or((list.is_empty(), list.as_str()), |names| (true, names));
    names.split(',').any(|word| word.trim() == name) != all_but
}

/// What to do if ranks do not reach each other.
pub fn network_remedy() -> String {
    let choice = std::env::var(MPI_INCLUDE).map_or("is not set".into(), |value| format!("is {value}"));
    format!(
        "set {MPI_INCLUDE} to the interface that joins the nodes: on {} it {choice}, and there are {}",
        host::name(),
        network::describe(&network::interfaces())
    )
}

/// The file that MPI is loaded from.
fn linked_mpi() -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path =
        maps.lines().find_map(|line| Some(&line[line.find('/')?..]).filter(|path| path.contains("/libmpi.so")))?;
    Some(path.to_string())
}

/// The PMI types that `srun --mpi=list` names; `None` if it names none.
fn offered_by_srun() -> Option<Vec<String>> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let said = within(PATIENCE, || Command::new("srun").arg("--mpi=list").output())?.ok()?;
    let text = [said.stdout, said.stderr].concat();
    let types = types_in(&String::from_utf8_lossy(&text));
    (said.status.success() && !types.is_empty()).then_some(types)
}

/// Each line has one type; a line of prose has spaces.
fn types_in(list: &str) -> Vec<String> {
    let lines = list.lines().flat_map(|line| line.rsplit(':').next()).flat_map(|line| line.split(','));
    lines.map(str::trim).filter(|word| !word.is_empty() && !word.contains(' ')).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::types_in;

    #[test]
    fn the_types_of_old_and_new_slurms_are_read() {
        let old = "srun: MPI types are...\nsrun: none\nsrun: pmi2\n";
        assert_eq!(types_in(old), ["none", "pmi2"]);
        let new = "MPI plugin types are...\n\tnone\n\tpmix\nspecific pmix plugin versions available: pmix_v4,pmix_v5\n";
        assert_eq!(types_in(new), ["none", "pmix", "pmix_v4", "pmix_v5"]);
        assert!(types_in("").is_empty());
    }
}
