//! Asynchronous events that wait to be handed out.

use crate::work::AsyncEvent;

/// At most one event of each kind waits.
#[derive(Debug, Default)]
pub(crate) struct Events {
    waiting: [Option<AsyncEvent>; 4],
    /// The event for the end of a shared receive queue's use was raised.
    is_last_wqe_reached: bool,
}

impl Events {
    pub(crate) fn raise(&mut self, event: AsyncEvent) {
        if self.waiting.contains(&Some(event)) {
            return;
        }
        if let Some(free) = self.waiting.iter_mut().find(|slot| slot.is_none()) {
            *free = Some(event);
        }
    }

    /// In ERR, with a shared receive queue: no more requests are taken from there. Raised once until
    /// [`clear`](Self::clear), and to be handed out after the completions.
    pub(crate) fn raise_last_wqe_reached(&mut self) {
        if !std::mem::replace(&mut self.is_last_wqe_reached, true) {
            self.raise(AsyncEvent::LastWqeReached);
        }
    }

    pub(crate) fn take(&mut self) -> Option<AsyncEvent> {
        self.waiting.iter_mut().find_map(Option::take)
    }

    /// To RESET: forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}
