//! This node's networks, and whether the variables that choose among them choose any.

use std::fs;
use std::net::Ipv4Addr;

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

/// All interfaces, the loopback too.
pub fn interfaces() -> Vec<Interface> {
    let read = |name: &str| fs::read_to_string(format!("/proc/self/net/{name}")).unwrap_or_default();
    parse(&read("dev"), &read("route"), &read("fib_trie"))
}

/// From the texts of Linux's `/proc/net`: `dev` has the names, `fib_trie` this node's own addresses, and `route` says
/// which network lies behind which name.
fn parse(dev: &str, route: &str, fib_trie: &str) -> Vec<Interface> {
    // The kernel prints the four bytes of an address, in the network's order, as one number of the machine's.
    let bits = |hex: &str| u32::from_str_radix(hex, 16).ok().map(|number| u32::from_be_bytes(number.to_ne_bytes()));
    let networks: Vec<(&str, u32, u32)> = route
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            Some((*fields.first()?, bits(fields.get(1)?)?, bits(fields.get(7)?)?))
        })
        .filter(|&(_, _, mask)| mask != 0)
        .collect();
    let lines: Vec<&str> = fib_trie.lines().map(str::trim).collect();
    let own: Vec<Ipv4Addr> = lines
        .windows(2)
        .filter(|pair| pair[1] == "/32 host LOCAL")
        .filter_map(|pair| pair[0].strip_prefix("|-- ")?.parse().ok())
        .collect();
    let address = |name: &str| {
        let behind =
            |own: &&Ipv4Addr| networks.iter().any(|&(of, network, mask)| of == name && own.to_bits() & mask == network);
        if name == "lo" {
            Some(Ipv4Addr::LOCALHOST)
        } else {
            own.iter().find(behind).copied()
        }
    };
    let names = dev.lines().filter_map(|line| Some(line.split_once(':')?.0.trim()));
    names.map(|name| Interface { name: name.into(), address: address(name) }).collect()
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

    const DEV: &str = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes\n    lo: 1 2 3\n  eth0: 4 5 6\n\
                       eth10:7 8 9\n   ib0: 1 1 1\n";
    const TRIE: &str = "Local:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 127.0.0.1\n        /32 host LOCAL\n\
                        |-- 192.0.2.2\n   /32 host LOCAL\n |-- 192.0.2.255\n   /32 link BROADCAST\n\
                        |-- 10.79.0.1\n   /32 host LOCAL\n";

    fn here() -> Vec<Interface> {
        // As the kernel of this machine would print them.
        let hex = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
        let line = |name: &str, network: [u8; 4], mask: [u8; 4]| {
            format!("{name} {} 00000000 0001 0 0 0 {} 0 0 0\n", hex(network), hex(mask))
        };
        let route = String::from("Iface Destination ...\n")
            + &line("eth10", [0; 4], [0; 4])
            + &line("eth0", [192, 0, 2, 0], [255, 255, 255, 0])
            + &line("eth10", [10, 79, 0, 0], [255, 255, 255, 0]);
        parse(DEV, &route, TRIE)
    }

    fn names(chosen: Vec<&Interface>) -> Vec<&str> {
        chosen.into_iter().map(|interface| interface.name.as_str()).collect()
    }

    #[test]
    fn interfaces_have_the_addresses_of_their_networks() {
        let found: Vec<(String, Option<String>)> =
            here().into_iter().map(|i| (i.name, i.address.map(|a| a.to_string()))).collect();
        let some = |name: &str, address: &str| (name.to_string(), Some(address.to_string()));
        let expected = [some("lo", "127.0.0.1"), some("eth0", "192.0.2.2"), some("eth10", "10.79.0.1")];
        assert_eq!(found[..3], expected);
        assert_eq!(found[3], ("ib0".to_string(), None));
        assert_eq!(describe(&here()), "eth0 192.0.2.2, eth10 10.79.0.1");
        assert!(interfaces().iter().any(Interface::is_loopback), "this machine: {:?}", interfaces());
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
