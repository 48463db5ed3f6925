//! This node's networks, and whether the variables that choose among them choose any.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

/// Chooses the interfaces of Open MPI's TCP, by name or as network/bits.
pub const MPI_INCLUDE: &str = "OMPI_MCA_btl_tcp_if_include";
/// Chooses the interfaces of NCCL's first contact and of its sockets.
pub const NCCL_INTERFACE: &str = "NCCL_SOCKET_IFNAME";

/// A network interface of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    /// Its first IPv4 address.
    pub address: Option<Ipv4Addr>,
}

impl Interface {
    pub fn is_loopback(&self) -> bool {
        self.address.is_some_and(|address| address.is_loopback())
    }
}

/// All interfaces, the loopback too, each once.
pub fn interfaces() -> Vec<Interface> {
    let mut found: Vec<Interface> = Vec::new();
    for one in getifaddrs::getifaddrs().into_iter().flatten() {
        let address = match one.address.ip_addr() {
            Some(IpAddr::V4(address)) => Some(address),
            _ => None,
        };
        match found.iter_mut().find(|interface| interface.name == one.name) {
            Some(interface) => interface.address = interface.address.or(address),
            None => found.push(Interface { name: one.name, address }),
        }
    }
    found
}

/// The interfaces that MPI's variable chooses: names and network/bits, with commas between them.
pub fn chosen_by_mpi<'a>(choice: &str, all: &'a [Interface]) -> Vec<&'a Interface> {
    let words: Vec<&str> = choice.split(',').map(str::trim).collect();
    let in_network = |word: &str, interface: &Interface| {
        let (network, bits) = word.split_once('/')?;
        let (network, bits): (Ipv4Addr, u32) = (network.parse().ok()?, bits.parse().ok()?);
        let mask = u32::MAX.checked_shl(32 - bits.min(32)).unwrap_or(0);
        Some(interface.address?.to_bits() & mask == network.to_bits() & mask)
    };
    let is_chosen = |i: &&Interface| words.iter().any(|&word| word == i.name || in_network(word, i).unwrap_or(false));
    all.iter().filter(is_chosen).collect()
}

/// The interfaces that NCCL's variable chooses: beginnings of names, after `=` whole names, after `^` those to leave out.
pub fn chosen_by_nccl<'a>(choice: &str, all: &'a [Interface]) -> Vec<&'a Interface> {
    let (out, rest) = choice.strip_prefix('^').map_or((false, choice), |rest| (true, rest));
    let (whole, rest) = rest.strip_prefix('=').map_or((false, rest), |rest| (true, rest));
    let words: Vec<&str> = rest.split(',').collect();
    let named = |name: &str| words.iter().any(|&word| if whole { name == word } else { name.starts_with(word) });
    all.iter().filter(|interface| named(&interface.name) != out).collect()
}

/// What MPI's variable gets wrong on this node, if anything.
pub fn wrong_for_mpi(choice: &str, all: &[Interface], several_nodes: bool) -> Option<String> {
    let chosen = chosen_by_mpi(choice, all);
    match chosen.is_empty() {
        true => Some(format!("{MPI_INCLUDE}={choice} names no interface of this node")),
        false if several_nodes && chosen.iter().all(|interface| interface.is_loopback()) => {
            Some(format!("{MPI_INCLUDE}={choice} names the loopback, which reaches no other node"))
        }
        false => None,
    }
}

/// Interfaces that could lead to other nodes, as text.
pub fn describe(all: &[Interface]) -> String {
    let others = all.iter().filter(|interface| !interface.is_loopback());
    let words: Vec<String> = others.filter_map(|i| Some(format!("{} {}", i.name, i.address?))).collect();
    if words.is_empty() {
        "none with an IPv4 address".into()
    } else {
        words.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Vec<Interface> {
        let one = |name: &str, address: &str| Interface { name: name.into(), address: address.parse().ok() };
        vec![one("lo", "127.0.0.1"), one("eth0", "192.0.2.2"), one("eth10", "10.79.0.1"), one("ib0", "")]
    }

    fn names(chosen: Vec<&Interface>) -> Vec<&str> {
        chosen.into_iter().map(|interface| interface.name.as_str()).collect()
    }

    #[test]
    fn this_machine_has_a_loopback_and_each_interface_once() {
        let mut names: Vec<String> = interfaces().into_iter().map(|interface| interface.name).collect();
        assert!(interfaces().iter().any(Interface::is_loopback), "{names:?}");
        names.sort();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all, "{names:?}");
        assert_eq!(describe(&here()), "eth0 192.0.2.2, eth10 10.79.0.1");
    }

    #[test]
    fn mpi_and_nccl_choose_by_their_own_rules() {
        let here = here();
        assert_eq!(names(chosen_by_mpi("eth0", &here)), ["eth0"]);
        assert_eq!(names(chosen_by_mpi("ib0, 10.79.0.77/24", &here)), ["eth10", "ib0"]);
        assert!(chosen_by_mpi("eth,10.80.0.0/16,nosuch0", &here).is_empty());
        assert_eq!(names(chosen_by_nccl("eth", &here)), ["eth0", "eth10"]);
        assert_eq!(names(chosen_by_nccl("=eth0", &here)), ["eth0"]);
        assert_eq!(names(chosen_by_nccl("^eth,lo", &here)), ["ib0"]);
        assert!(chosen_by_nccl("nosuch", &here).is_empty());
    }

    #[test]
    fn a_wrong_choice_is_named() {
        let here = here();
        let wrong = |choice: &str, several: bool| wrong_for_mpi(choice, &here, several);
        assert_eq!(wrong("eth0", true), None);
        assert_eq!(wrong("lo", false), None);
        assert!(wrong("lo", true).unwrap().contains("=lo names the loopback"));
        assert!(wrong("nosuch0", false).unwrap().contains("=nosuch0 names no interface"));
    }
}
