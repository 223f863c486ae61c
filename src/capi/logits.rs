//! Logits of what follows a session's tokens. A step leaves its own in the buffers that it was computed in: most are never
//! asked for, and a copy of a vocabulary costs more than the rest of a call. They come out when somebody asks for them, or
//! when another call is about to use the buffers.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::status::{Fail, Result};
use crate::Buffers;

/// `[vocab]`, once they are out of the buffers. Forks share them.
pub(super) struct Logits(OnceLock<Result<Vec<f32>>>);

impl Logits {
    pub fn known(logits: Vec<f32>) -> Arc<Logits> {
        Arc::new(Logits(OnceLock::from(Ok(logits))))
    }
}

/// Buffers, and those who have their logits in them, with their place in the last step's batch.
#[derive(Default)]
pub(super) struct Lent {
    buffers: Buffers,
    left: Vec<(usize, Weak<Logits>)>,
}

impl Lent {
    /// Leaves the logits of sequence `i` of the step that these buffers were used for last in this call.
    pub fn leave(&mut self, i: usize) -> Arc<Logits> {
        let logits = Arc::new(Logits(OnceLock::new()));
        self.left.push((i, Arc::downgrade(&logits)));
        logits
    }

    /// Those whose logits are nowhere else, and wanted still.
    fn waiting(&self) -> impl Iterator<Item = (usize, Arc<Logits>)> {
        let alive = self.left.iter().filter_map(|(i, logits)| Some((*i, logits.upgrade()?)));
        alive.filter(|(_, logits)| logits.0.get().is_none())
    }

    /// Copies the logits out of the buffers for all of those that `wanted` names.
    fn take_out(&mut self, wanted: impl Fn(&Arc<Logits>) -> bool) {
        let waiting: Vec<_> = self.waiting().filter(|(_, logits)| wanted(logits)).collect();
        for (i, logits) in waiting {
            logits.0.get_or_init(|| Ok(self.buffers.logits(i)?.to_vec()));
        }
    }
}

impl Deref for Lent {
    type Target = Buffers;

    fn deref(&self) -> &Buffers {
        &self.buffers
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Buffers {
        &mut self.buffers
    }
}

/// The buffers of an engine's calls that are over: their number is that of the calls that ran at once, not that of the sessions.
#[derive(Default)]
pub(super) struct Pool(Mutex<Vec<Lent>>);

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Vec<Lent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Buffers for a call; if possible such that nobody's logits are in. Those come out before anybody can look for them.
    pub fn lend(&self) -> Lent {
        let mut pool = self.lock();
        let unused = pool.iter().rposition(|lent| lent.waiting().next().is_none());
        let Some(at) = unused.or(pool.len().checked_sub(1)) else { return Lent::default() };
        let mut lent = pool.swap_remove(at);
        lent.take_out(|_| true);
        lent.left.clear();
        lent
    }

    pub fn give_back(&self, lent: Lent) {
        self.lock().push(lent);
    }

    /// Logits, from where they are.
    pub fn logits<'a>(&self, logits: &'a Arc<Logits>) -> Result<&'a [f32]> {
        self.lock().iter_mut().for_each(|lent| lent.take_out(|other| Arc::ptr_eq(other, logits)));
        match logits.0.get() {
            Some(known) => known.as_deref().map_err(Fail::clone),
            None => Err(Fail::internal("logits were lost")), // with their buffers, in a call that panicked
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::super::handles;
    use crate::capi::*;

    /// Logits are copied when somebody asks for them, or another session's call takes their buffers.
    #[test]
    fn nobody_copies_what_nobody_wants() {
        let (mut engine, mut sessions) = (ptr::null_mut(), [ptr::null_mut(); 2]);
        let mut options: EngineOptions = structs::Sized32::defaults();
        options.device = c"cpu".as_ptr();
        // SAFETY: pointers to values of this function, a C string.
        unsafe {
            let model = c"synthetic:tiny".as_ptr();
            assert_eq!(specache_engine_create(SPECACHE_ABI_VERSION, model, &options, &mut engine), 0);
            for session in &mut sessions {
                assert_eq!(specache_session_create(engine, ptr::null(), 300, session), 0);
                assert_eq!(specache_session_prefill(*session, [1, 2, 3].as_ptr(), 3), 0);
            }
        }
        let out = |session| {
            let object = handles::session(session).unwrap();
            let logits = object.lock().unwrap().logits.clone().unwrap();
            logits.0.get().is_some()
        };
        // SAFETY: NULL is allowed.
        let step = |session| assert_eq!(unsafe { specache_session_step(session, 4, ptr::null_mut(), 0) }, 0);
        let batch = || {
            let logits = ptr::null_mut();
            let step = |session| Step { session, logits, n_logits: 0, token: 5, next: 0, status: 0, reserved: 0 };
            let mut steps = sessions.map(step);
            // SAFETY: as many steps as there are, without logits.
            assert_eq!(unsafe { specache_step_batch(steps.as_mut_ptr(), 2, size_of::<Step>()) }, 0);
        };
        let [one, other] = sessions;
        assert!(out(one) && out(other), "a prefill's are the session's");
        for _ in 0..3 {
            step(one);
            assert!(!out(one));
        }
        step(other);
        assert!(out(one) && !out(other), "the other call has taken them out");
        for _ in 0..3 {
            batch();
            assert!(!out(one) && !out(other));
        }
        let (mut token, mut n) = (0, 0);
        // SAFETY: values of this function; NULL is allowed.
        unsafe {
            assert_eq!(specache_session_sample(one, &mut token), 0);
            assert!(out(one) && !out(other));
            assert_eq!(specache_session_logits(other, ptr::null_mut(), 0, &mut n), 0);
            assert!(out(other));
            let (user_data, generated, stop) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
            assert_eq!(specache_session_generate(one, 3, 3, None, user_data, generated, stop), 0);
        }
        assert!(!out(one), "a generation leaves its last ones, too");
        assert_eq!(handles::engine(engine).unwrap().pool.lock().len(), 1, "one call at a time needs no more buffers");
        sessions.into_iter().for_each(|session| specache_session_free(session));
        specache_engine_free(engine);
    }
}
