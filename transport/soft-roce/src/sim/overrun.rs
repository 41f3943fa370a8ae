//! Completion queues of a simulation that are too small: what overruns one ends every queue pair that
//! reports to it, and from then on nobody learns what becomes of their requests.

use super::{Violation, World};
use crate::qp::QpState;

impl World {
    /// Notes which queues have overrun. Their queue pairs must be in ERR.
    pub(super) fn note_overruns(&mut self) -> Result<(), Violation> {
        for n in 0..self.nodes.len() {
            for cq in 0..self.nodes[n].cqs.len() {
                if !self.nodes[n].cqs[cq].is_overrun() {
                    continue;
                }
                demand!(
                    self.nodes[n].has_small_cq && cq == 0,
                    "node {n}: a completion queue has overrun that is large enough"
                );
                self.note_overrun(n)?;
            }
        }
        Ok(())
    }

    fn note_overrun(&mut self, n: usize) -> Result<(), Violation> {
        let node = &mut self.nodes[n];
        for (d, direction) in self.directions.iter().enumerate() {
            if direction.from != n || !direction.cqs.contains(&0) {
                continue;
            }
            let state = node.device.state(direction.qpn);
            demand!(
                matches!(state, QpState::Err | QpState::Reset),
                "node {n}: a queue pair is in {state:?} behind an overrun completion queue"
            );
            self.connections[d / 2].can_fail = true;
            self.connections[d / 2].is_unheard = true;
        }
        if let Some(mailbox) = &mut node.mailbox
            && mailbox.cqs.contains(&0)
        {
            let state = node.device.state(mailbox.qpn);
            demand!(
                state == QpState::Err,
                "node {n}: the mailbox is in {state:?}"
            );
            mailbox.is_unheard = true;
        }
        Ok(())
    }

    /// Expects no more of requests of node `n` whose completions went to an overrun queue: all that were
    /// not lost have been judged.
    pub(super) fn abandon_unheard(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        if !node.has_small_cq || !node.cqs[0].is_overrun() {
            return;
        }
        for d in 0..self.directions.len() {
            let [send_cq, recv_cq] = self.directions[d].cqs;
            if self.directions[d].from != n {
                continue;
            }
            if send_cq == 0 {
                self.directions[d].abandon(node);
            }
            if recv_cq == 0 {
                let receives = &mut self.directions[d ^ 1].receives;
                receives.outstanding().for_each(|buffer| node.adopt(buffer));
                receives.forget();
            }
        }
        if let Some(mut mailbox) = node.mailbox.take() {
            mailbox.abandon(node);
            node.mailbox = Some(mailbox);
        }
    }

    /// Each overrun has raised one event.
    pub(super) fn check_cq_errors(&self, n: usize) -> Result<(), Violation> {
        let node = &self.nodes[n];
        let overruns = node.cqs.iter().filter(|cq| cq.is_overrun()).count();
        demand!(
            node.cq_errors == overruns || !node.is_alive,
            "{overruns} completion queues have overrun, of which {} told",
            node.cq_errors
        );
        Ok(())
    }
}
