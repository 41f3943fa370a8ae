//! Requests that this side executes by itself: binding and revoking memory windows.
//!
//! They keep their place in the send queue and take no PSN. Each is executed once, when sending comes to
//! it for the first time, which `begun` remembers; going back passes over it. It completes when all
//! requests before it have.

use super::Context;
use super::requester::Requester;
use crate::qp::local::execute;
use crate::work::SendOp;

impl Requester {
    /// Executes the requests at which sending has come that need no packet.
    pub(super) fn execute_local(&mut self, ctx: &mut Context<'_>) {
        while self.sending < self.sq.tail && self.sq.wqe(self.sending).op.is_local() {
            if self.sending >= self.begun {
                if !self.may_execute(ctx) {
                    return;
                }
                let op = self.sq.wqe(self.sending).op;
                if let Err(status) = execute(&op, ctx.mem, (ctx.pd, ctx.qpn)) {
                    self.fail_locally(self.sending, status);
                    return;
                }
                self.begun = self.sending + 1;
            }
            self.sending += 1;
            self.pass_local();
        }
    }

    /// The oldest request is done, and with it the executed ones right behind it that made no packet.
    pub(super) fn finish_oldest(&mut self) {
        self.sq.done += 1;
        self.pass_local();
    }

    fn pass_local(&mut self) {
        while self.sq.done < self.begun && self.sq.wqe(self.sq.done).op.is_local() {
            self.sq.done += 1;
        }
        // Never behind `done`: those places of the ring are given away.
        self.sending = self.sending.max(self.sq.done);
    }

    fn may_execute(&self, ctx: &Context<'_>) -> bool {
        let wqe = self.sq.wqe(self.sending);
        // As in rxe, the local invalidate fence is not optional.
        let is_behind =
            matches!(wqe.op, SendOp::LocalInvalidate { .. }) && self.sending > self.sq.done;
        let is_stopped = self.has_failed() || self.is_at_local_error();
        !is_stopped && !is_behind && self.may_begin(wqe, ctx.attr)
    }
}
