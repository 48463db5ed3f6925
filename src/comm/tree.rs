//! The way of what is small: a binomial tree over the ranks, whose root is rank 0.
//!
//! A subtree holds ranks that follow each other, so what is joined on the way up keeps the order of the ranks. No rank has
//! more than log2 N neighbours, and none is further than log2 N from the root.

/// A rank's neighbours in the tree.
#[derive(Debug, PartialEq, Eq)]
pub struct Branch {
    /// `None` at the root.
    pub parent: Option<usize>,
    /// (rank, ranks of its subtree), ascending: together with this rank they cover the ranks of its own subtree.
    pub children: Vec<(usize, usize)>,
}

impl Branch {
    /// The place of one of `ranks` ranks.
    pub fn of(rank: usize, ranks: usize) -> Self {
        let steps = (0..usize::BITS).map(|bit| 1 << bit).take_while(|step| rank & step == 0 && rank + step < ranks);
        let children = steps.map(|step| (rank + step, step.min(ranks - rank - step))).collect();
        Self { parent: (rank > 0).then(|| rank & (rank - 1)), children }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_reaches_each_rank_once_and_grows_with_the_logarithm() {
        for ranks in (1usize..=70).chain([1000, 16_384]) {
            let most = ranks.next_power_of_two().trailing_zeros() as usize;
            for rank in 0..ranks {
                let Branch { parent, children } = Branch::of(rank, ranks);
                assert!(children.len() + usize::from(parent.is_some()) <= most.max(1), "{rank} of {ranks}");
                // A subtree is a stretch of ranks, and so are its parts.
                let mut next = rank + 1;
                for &(child, below) in &children {
                    assert_eq!((child, Branch::of(child, ranks).parent), (next, Some(rank)), "{ranks} ranks");
                    next += below;
                }
                if rank == 0 {
                    assert_eq!(next, ranks);
                }
                let mut above = rank;
                let hops = std::iter::from_fn(|| Branch::of(above, ranks).parent.inspect(|&parent| above = parent));
                assert!(hops.count() <= most, "{rank} of {ranks}");
            }
        }
        assert_eq!(Branch::of(4, 7), Branch { parent: Some(0), children: vec![(5, 1), (6, 1)] });
    }
}
