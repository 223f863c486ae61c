//! Logits of what follows a session's tokens. A step leaves its own in the buffers that it was computed in: most are never
//! asked for, and a copy of a vocabulary costs more than the rest of a call. They come out when somebody asks for them, or
//! when another call is about to use the buffers.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::{mem, ptr};

use super::status::{Fail, Result};
use crate::Buffers;

/// `[vocab]`, once they are out of the buffers. Forks share them.
#[derive(Default)]
pub(super) struct Logits {
    row: OnceLock<Result<Vec<f32>>>,
    /// The buffers that they are in, when the call is over.
    from: OnceLock<Weak<Mutex<Lent>>>,
}

impl Logits {
    pub fn known(logits: Vec<f32>) -> Arc<Logits> {
        Arc::new(Logits { row: OnceLock::from(Ok(logits)), from: OnceLock::new() })
    }

    fn are_out(&self) -> bool {
        self.row.get().is_some()
    }

    /// From where they are.
    pub fn get(&self) -> Result<&[f32]> {
        // A call that has taken the buffers meanwhile has taken these out of them first.
        if let (false, Some(lent)) = (self.are_out(), self.from.get().and_then(Weak::upgrade)) {
            lock(&lent).take_out(|other| ptr::eq(other, self));
        }
        match self.row.get() {
            Some(known) => known.as_deref().map_err(Fail::clone),
            None => Err(Fail::internal("logits were lost")), // with their buffers, in a call that panicked
        }
    }
}

/// Buffers, and those who have their logits in them, with their place in the last step's batch.
#[derive(Default)]
pub(super) struct Lent {
    buffers: Buffers,
    left: Vec<(usize, Weak<Logits>)>,
    /// Sequences of the last call: what the buffers have grown for.
    n: usize,
}

impl Lent {
    /// Leaves the logits of sequence `i` of the step that these buffers were used for last in this call.
    pub fn leave(&mut self, i: usize) -> Arc<Logits> {
        let logits = Arc::<Logits>::default();
        self.left.push((i, Arc::downgrade(&logits)));
        logits
    }

    /// Those whose logits are nowhere else, and wanted still.
    fn waiting(&self) -> impl Iterator<Item = (usize, Arc<Logits>)> {
        let alive = self.left.iter().filter_map(|(i, logits)| Some((*i, logits.upgrade()?)));
        alive.filter(|(_, logits)| !logits.are_out())
    }

    /// Copies the logits out of the buffers for all of those that `wanted` names.
    fn take_out(&mut self, wanted: impl Fn(&Logits) -> bool) {
        let waiting: Vec<_> = self.waiting().filter(|(_, logits)| wanted(logits)).collect();
        for (i, logits) in waiting {
            logits.row.get_or_init(|| Ok(self.buffers.logits(i)?.to_vec()));
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The buffers of an engine's calls that are over: their number is that of the calls that ran at once, and one more where a
/// batch has left logits; not that of the sessions.
#[derive(Default)]
pub(super) struct Pool(Mutex<Vec<Arc<Mutex<Lent>>>>);

impl Pool {
    /// Buffers for a call with `n` sequences. Logits that are in them come out before anybody can look for them, so those with
    /// the fewest are taken, and of these such as have served as many sequences: the others need not grow. Whoever follows a
    /// batch does not pay for all of its logits, but begins buffers of its own once.
    pub fn lend(&self, n: usize) -> Lent {
        let taken = {
            let mut pool = lock(&self.0);
            // Buffers that somebody is taking logits out of are busy.
            let cost = |lent: &Arc<Mutex<Lent>>| {
                let lent = lent.try_lock().ok()?;
                Some((lent.waiting().count(), lent.n != n))
            };
            let best = (0..pool.len()).rev().filter_map(|i| Some((cost(&pool[i])?, i))).min_by_key(|(cost, _)| *cost);
            best.filter(|((waiting, _), _)| *waiting <= 1 || pool.len() > 1).map(|(_, i)| pool.swap_remove(i))
        };
        let mut lent = Lent::default();
        if let Some(taken) = taken {
            let mut taken = lock(&taken);
            taken.take_out(|_| true);
            lent = mem::take(&mut *taken);
            lent.left.clear();
        }
        lent.n = n;
        lent
    }

    pub fn give_back(&self, lent: Lent) {
        let left: Vec<Arc<Logits>> = lent.left.iter().filter_map(|(_, logits)| logits.upgrade()).collect();
        let lent = Arc::new(Mutex::new(lent));
        // Once: they were left in this call.
        left.iter().for_each(|logits| drop(logits.from.set(Arc::downgrade(&lent))));
        lock(&self.0).push(lent);
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
            logits.are_out()
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
        let buffers = || handles::engine(engine).unwrap().pool.0.lock().unwrap().len();
        assert_eq!(buffers(), 1, "one call at a time needs no more");
        batch();
        let mut third = ptr::null_mut();
        // SAFETY: values of this function.
        unsafe {
            assert_eq!(specache_session_create(engine, ptr::null(), 300, &mut third), 0);
            assert_eq!(specache_session_prefill(third, [1, 2, 3].as_ptr(), 3), 0);
        }
        step(third);
        assert!(!out(one) && !out(other) && !out(third), "nobody pays for a batch of others");
        batch();
        step(third);
        assert_eq!(buffers(), 2, "each kind of call has its own");
        specache_session_free(third);
        sessions.into_iter().for_each(|session| specache_session_free(session));
        specache_engine_free(engine);
    }
}
