//! What goes wrong, and how it is put right.

use super::clients::Start;
use super::events::{Happening, ProcessEvent};
use super::plan::new_memory_id;
use super::storage::Memory;
use super::{Site, Violation, World, demand};
use crate::coordinator::Member;

impl World {
    /// Something goes wrong.
    pub(super) fn strike(&mut self) {
        if self.is_calm {
            return;
        }
        self.stats.disasters += 1;
        let n = self.rng.below(self.machines.len());
        let kinds = if self.plan.is_narrow { 10 } else { 19 };
        match self.rng.below(kinds) {
            _ if self.plan.has_blackouts && self.rng.chance(5) => self.black_out(),
            0..4 => self.crash(n),
            4 => self.lose_power(n),
            5 | 6 => self.pause(n),
            7 => self.cut(),
            8 | 9 => self.lose_lane(),
            10 => self.slow_disk(n),
            11 | 12 => self.hand_over_all(n),
            13 => self.fill_disk(n),
            14 => self.fail_disk(n),
            15 => self.run_out_of_memory(n),
            16 | 17 => self.evict(n),
            _ => self.send_consumer(),
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
            other != n && self.machines[other].memory_id == member.memory_id
        };
        let is_survived = |isr: &[Member]| isr.iter().any(survives);
        if self.machines[n].process.is_none() || !self.registry.possible_isrs().all(is_survived) {
            return;
        }
        self.cut_power(n);
        let delay = self.rng.spread(10_000_000, 3_000_000_000);
        self.schedule(delay, Happening::Start { node: n });
    }

    pub(super) fn cut_power(&mut self, n: usize) {
        self.note(|| format!("node {n} loses power"));
        self.stats.power_losses += 1;
        self.end_process(n, true);
        let machine = &mut self.machines[n];
        machine.memory_id = new_memory_id(&mut self.rng);
        for store in &mut machine.stores {
            store.memory = Memory::new();
            store.disk.lose_power(&mut self.rng);
        }
    }

    /// All machines lose their memory at once: what is not on every member's device may be lost, and other
    /// records may take its place.
    pub(super) fn black_out(&mut self) {
        self.note(|| "all power is lost".to_owned());
        for n in 0..self.machines.len() {
            let was_running = self.machines[n].process.is_some();
            self.cut_power(n);
            if was_running {
                let delay = self.rng.spread(10_000_000, 1_000_000_000);
                self.schedule(delay, Happening::Start { node: n });
            }
        }
        self.stats.blackouts += 1;
        for partition in 0..self.oracles.len() {
            self.oracles[partition].forget_what_was_in_memory();
            self.restart_consumers(partition);
        }
    }

    /// A replica says that records are lost: that must have a reason. Until then a consumer may have got them
    /// from a node that still has them.
    pub(super) fn lose_records(&mut self, site: Site, cause: &str) -> Result<(), Violation> {
        demand!(
            self.stats.blackouts > 0,
            "{site} says that it has lost records: {cause}"
        );
        self.oracles[site.partition].forget_what_was_in_memory();
        self.restart_consumers(site.partition);
        Ok(())
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
        self.verbs.set_cut(a, b, true);
        self.cut_connections(a, b);
        let delay = self.rng.spread(1_000_000, 4_000_000_000);
        self.schedule(delay, Happening::Heal { a, b });
    }

    pub(super) fn heal(&mut self, a: usize, b: usize) {
        if self.cuts.remove(&(a.min(b), a.max(b))) {
            self.note(|| format!("nodes {a} and {b} reach each other again"));
            self.verbs.set_cut(a, b, false);
            self.heal_connections(a, b);
        }
    }

    /// So many acknowledgements are lost that the sender gives up.
    fn lose_lane(&mut self) {
        let lanes = 0..self.lanes.len();
        let living: Vec<usize> = lanes.filter(|l| self.verbs.has_sender(*l)).collect();
        if !living.is_empty() {
            let l = self.rng.pick(&living);
            let (from, to) = (self.lanes[l].from, self.lanes[l].to);
            self.note(|| format!("lane {from}->{to} fails"));
            self.stats.lost_lanes += 1;
            self.verbs.lose(self.now, l);
        }
    }

    fn slow_disk(&mut self, n: usize) {
        self.note(|| format!("node {n} has a slow disk"));
        self.machines[n].is_disk_slow = true;
        let delay = self.rng.spread(10_000_000, 5_000_000_000);
        self.schedule(delay, Happening::QuickDisk { node: n });
    }

    /// A node gives away what it leads, and stops, or goes on.
    fn hand_over_all(&mut self, n: usize) {
        let Some(process) = &mut self.machines[n].process else {
            return;
        };
        let incarnation = process.incarnation;
        self.tell_later(0, (n, incarnation), ProcessEvent::HandOver);
        if self.rng.chance(60) {
            let process = self.machines[n].process.as_mut();
            process.expect("as above").is_stopping = true;
            let stop = Happening::Stop {
                node: n,
                incarnation,
            };
            self.schedule(2_000_000_000, stop);
        }
    }

    fn fill_disk(&mut self, n: usize) {
        self.note(|| format!("node {n} has a full disk"));
        self.set_full(n, true);
        let delay = self.rng.spread(10_000_000, 5_000_000_000);
        self.schedule(delay, Happening::Room { node: n });
    }

    pub(super) fn set_full(&mut self, n: usize, is_full: bool) {
        for store in &mut self.machines[n].stores {
            store.disk.is_full = is_full;
        }
    }

    /// The device fails for one partition's files; somebody starts the node again, some time later.
    fn fail_disk(&mut self, n: usize) {
        let Some(process) = &self.machines[n].process else {
            return;
        };
        let incarnation = process.incarnation;
        let partition = self.rng.below(self.oracles.len());
        let site = Site { node: n, partition };
        self.note(|| format!("{site}: the device fails"));
        self.store_mut(site).disk.is_poisoned = true;
        let delay = self.rng.spread(10_000_000, 4_000_000_000);
        let stop = Happening::Stop {
            node: n,
            incarnation,
        };
        self.schedule(delay, stop);
    }

    fn run_out_of_memory(&mut self, n: usize) {
        self.note(|| format!("node {n} has no memory for images"));
        self.machines[n].is_short_of_memory = true;
        let delay = self.rng.spread(10_000_000, 3_000_000_000);
        self.schedule(delay, Happening::Memory { node: n });
    }

    /// Memory is wanted: images that are kept for readers go.
    fn evict(&mut self, n: usize) {
        let partition = self.rng.below(self.oracles.len());
        let count = 1 + self.rng.below(4);
        let process = self.machines[n].process.as_mut();
        let Some(process) = process.filter(|p| !p.is_paused) else {
            return;
        };
        self.stats.evictions += 1;
        let replica = &mut process.held[partition].replica;
        for _ in 0..count {
            if let Some(leader) = replica.leader_mut() {
                leader.release_retired();
            } else if let Some(follower) = replica.follower_mut() {
                follower.release_retired();
            }
        }
        // What it wants now is done with the next event.
        let me = (n, process.incarnation);
        self.tell_later(0, me, ProcessEvent::Timer { partition, at: 0 });
    }

    /// A consumer begins anew somewhere.
    fn send_consumer(&mut self) {
        let i = self.rng.below(self.consumers.len());
        let start = self
            .rng
            .pick(&[Start::Earliest, Start::Latest, Start::Anywhere]);
        self.restart_consumer(i, start);
    }

    /// All that is wrong is put right.
    pub(super) fn calm_down(&mut self) -> Result<(), Violation> {
        self.note(|| "from now on all goes well".to_owned());
        self.is_calm = true;
        self.verbs.calm();
        let cuts: Vec<(usize, usize)> = self.cuts.iter().copied().collect();
        for (a, b) in cuts {
            self.heal(a, b);
        }
        for n in 0..self.machines.len() {
            self.machines[n].is_disk_slow = false;
            self.machines[n].is_short_of_memory = false;
            self.set_full(n, false);
            self.resume(n)?;
        }
        Ok(())
    }
}
