//! What goes wrong, and how it is put right.

use super::events::Happening;
use super::storage::Memory;
use super::{Violation, World};
use crate::coordinator::Member;

impl World {
    /// Something goes wrong.
    pub(super) fn strike(&mut self) {
        if self.is_calm {
            return;
        }
        let n = self.rng.below(self.machines.len());
        match self.rng.below(10) {
            _ if self.plan.has_blackouts && self.rng.chance(5) => self.black_out(),
            0..3 => self.crash(n),
            3 => self.lose_power(n),
            4 | 5 => self.pause(n),
            6 => self.cut(),
            7 | 8 => self.lose_lane(),
            _ => self.slow_disk(n),
        }
        let delay = self
            .rng
            .spread(self.plan.disaster_ns / 16 + 1, self.plan.disaster_ns);
        self.schedule(delay, Happening::Disaster);
    }

    fn crash(&mut self, n: usize) {
        if self.machines[n].process.is_none() {
            return;
        }
        self.note(|| format!("node {n} crashes"));
        self.stats.crashes += 1;
        self.end_process(n, false);
        let delay = self.rng.spread(1_000_000, 3_000_000_000);
        self.schedule(delay, Happening::Start { node: n });
    }

    fn lose_power(&mut self, n: usize) {
        // Nothing is promised once the last member has lost its memory.
        let survives = |member: &Member| {
            let other = member.node as usize;
            other != n && self.machines[other].memory.id == member.memory_id
        };
        let is_survived = |isr: &[Member]| isr.iter().any(survives);
        if self.machines[n].process.is_none() || !self.registry.possible_isrs().all(is_survived) {
            return;
        }
        self.cut_power(n);
        let delay = self.rng.spread(10_000_000, 3_000_000_000);
        self.schedule(delay, Happening::Start { node: n });
    }

    fn cut_power(&mut self, n: usize) {
        self.note(|| format!("node {n} loses power"));
        self.stats.power_losses += 1;
        self.end_process(n, true);
        let memory = Memory::new(&mut self.rng);
        let machine = &mut self.machines[n];
        machine.memory = memory;
        machine.disk.lose_power(&mut self.rng);
    }

    /// All machines lose their memory at once: what is not on every member's device may be lost, and other
    /// records may take its place.
    fn black_out(&mut self) {
        self.note(|| "all power is lost".to_owned());
        for n in 0..self.machines.len() {
            let was_running = self.machines[n].process.is_some();
            self.cut_power(n);
            if was_running {
                let delay = self.rng.spread(10_000_000, 1_000_000_000);
                self.schedule(delay, Happening::Start { node: n });
            }
        }
        self.oracle.forget_what_was_in_memory();
        self.restart_consumers();
    }

    fn pause(&mut self, n: usize) {
        let Some(process) = &mut self.machines[n].process else {
            return;
        };
        if std::mem::replace(&mut process.is_paused, true) {
            return;
        }
        self.note(|| format!("node {n} stands still"));
        self.stats.pauses += 1;
        let delay = self.rng.spread(1_000_000, 4_000_000_000);
        self.schedule(delay, Happening::Resume { node: n });
    }

    pub(super) fn resume(&mut self, n: usize) -> Result<(), Violation> {
        let Some(process) = &mut self.machines[n].process else {
            return Ok(());
        };
        if !std::mem::replace(&mut process.is_paused, false) {
            return Ok(());
        }
        self.note(|| format!("node {n} runs again"));
        while let Some(process) = &mut self.machines[n].process
            && let Some(event) = process.inbox.pop_front()
        {
            self.with_process(n, |world, process| world.handle(n, process, event))?;
        }
        Ok(())
    }

    fn cut(&mut self) {
        // The last one is the coordinator: whoever is cut off from it alone writes on for a while.
        let registry = self.machines.len();
        let a = self.rng.below(registry);
        let b = if self.rng.chance(50) {
            registry
        } else {
            self.rng.below(registry)
        };
        if a == b || self.is_cut(a, b) {
            return;
        }
        self.note(|| format!("nodes {a} and {b} are cut off from each other"));
        self.stats.cuts += 1;
        self.cuts.insert((a.min(b), a.max(b)));
        self.cut_connections(a, b);
        let delay = self.rng.spread(1_000_000, 4_000_000_000);
        self.schedule(delay, Happening::Heal { a, b });
    }

    pub(super) fn heal(&mut self, a: usize, b: usize) {
        if self.cuts.remove(&(a.min(b), a.max(b))) {
            self.note(|| format!("nodes {a} and {b} reach each other again"));
            self.heal_connections(a, b);
        }
    }

    /// So many acknowledgements are lost that the sender gives up.
    fn lose_lane(&mut self) {
        let living: Vec<usize> = (0..self.lanes.len())
            .filter(|l| self.lanes[*l].has_sender)
            .collect();
        if !living.is_empty() {
            let l = self.rng.pick(&living);
            let (from, to) = (self.lanes[l].from, self.lanes[l].to);
            self.note(|| format!("lane {from}->{to} fails"));
            self.stats.lost_lanes += 1;
            self.fail_lane(l);
        }
    }

    fn slow_disk(&mut self, n: usize) {
        self.note(|| format!("node {n} has a slow disk"));
        self.machines[n].is_disk_slow = true;
        let delay = self.rng.spread(10_000_000, 5_000_000_000);
        self.schedule(delay, Happening::QuickDisk { node: n });
    }

    /// All that is wrong is put right.
    pub(super) fn calm_down(&mut self) -> Result<(), Violation> {
        self.note(|| "from now on all goes well".to_owned());
        self.is_calm = true;
        let cuts: Vec<(usize, usize)> = self.cuts.iter().copied().collect();
        for (a, b) in cuts {
            self.heal(a, b);
        }
        for n in 0..self.machines.len() {
            self.machines[n].is_disk_slow = false;
            self.resume(n)?;
        }
        Ok(())
    }
}
