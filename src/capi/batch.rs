//! A decode step of several sessions at once.

use std::sync::{Arc, MutexGuard};

use super::handles;
use super::logits::Lent;
use super::memory::slice_mut;
use super::session::{LogitsOut, SessionObject, State};
use super::status::{Fail, Result, Status, guard};
use crate::error::Error;
use crate::{Buffers, Next};

/// `specache_step`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[allow(missing_docs)] // The header's words.
pub struct Step {
    pub session: *mut handles::SessionHandle,
    pub logits: *mut f32,
    pub n_logits: u64,
    pub token: u32,
    pub next: u32,
    pub status: i32,
    pub reserved: u32,
}

/// A sequence that takes part.
struct Member<'a> {
    /// Place among the caller's steps.
    index: usize,
    object: &'a SessionObject,
    state: MutexGuard<'a, State>,
    token: u32,
    logits: LogitsOut,
}

/// Takes part, or says why it cannot.
fn admit<'a>(step: &Step, index: usize, object: &'a Result<Arc<SessionObject>>) -> Result<Member<'a>> {
    let object = object.as_ref().map_err(Fail::clone)?;
    let n_logits = usize::try_from(step.n_logits).unwrap_or(usize::MAX);
    let logits = LogitsOut::new(object, step.logits, n_logits)?;
    let mut state = object.lock()?;
    object.check_cancel()?;
    let session = state.session()?;
    object.engine.engine.check(&Next { session, token: step.token })?;
    Ok(Member { index, object, state, token: step.token, logits })
}

/// Steps all members. A step that one of them stops half way changes nothing: the others make it again without that one.
fn decode(members: &mut Vec<Member>, buffers: &mut Buffers, failed: &mut impl FnMut(usize, Fail)) -> Result<()> {
    loop {
        let Some(engine) = members.first().map(|m| m.object.engine.clone()) else { return Ok(()) };
        let mut batch = Vec::with_capacity(members.len());
        for Member { state, token, .. } in members.iter_mut() {
            batch.push(Next { session: state.session()?, token: *token });
        }
        match engine.engine.decode(&mut batch, buffers) {
            Ok(()) => return Ok(()),
            Err(Error::Interrupted) => members.retain(|m| match m.object.check_cancel() {
                Ok(()) => true,
                Err(fail) => {
                    failed(m.index, fail);
                    false
                }
            }),
            Err(error) => return Err(error.into()),
        }
    }
}

/// What a step has come to for one member.
fn finish(member: &mut Member, i: usize, buffers: &mut Lent) -> Result<u32> {
    let state = &mut *member.state;
    state.stepped(member.token, i, buffers)?;
    state.logits = Some(buffers.leave(i));
    // SAFETY: the header's contract.
    unsafe { member.logits.write(i, buffers) }?;
    Ok(buffers.sample(i, &mut state.sampler, &state.tokens)?)
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_step_batch(steps: *mut Step, n_steps: usize, step_size: usize) -> i32 {
    guard(|| {
        if step_size != size_of::<Step>() {
            let own = size_of::<Step>();
            return Err(Fail::new(Status::Abi, format!("step_size {step_size}: sizeof(specache_step) is {own} here")));
        }
        // SAFETY: the header's contract.
        let steps = unsafe { slice_mut(steps, n_steps, "steps") }?;
        let mut fails: Vec<(usize, Fail)> = Vec::new();
        // What they are if a panic comes.
        for step in steps.iter_mut() {
            (step.next, step.status) = (u32::MAX, Status::Internal as i32);
        }
        let whole = run(steps, &mut fails);
        let status = whole.as_ref().map_or_else(|fail| fail.status, |()| Status::Ok);
        steps.iter_mut().for_each(|step| step.status = status as i32);
        fails.sort_by_key(|(i, _)| *i);
        for (i, fail) in &fails {
            steps[*i].status = fail.status as i32;
        }
        whole?;
        let texts: Vec<String> = fails.iter().map(|(i, fail)| format!("step {i}: {}", fail.why)).collect();
        fails.first().map_or(Ok(()), |(_, first)| Err(Fail::new(first.status, texts.join("\n"))))
    })
}

fn run(steps: &mut [Step], fails: &mut Vec<(usize, Fail)>) -> Result<()> {
    // The references outlive the locks.
    let objects: Vec<_> = steps.iter().map(|step| handles::session(step.session)).collect();
    let mut members = Vec::with_capacity(steps.len());
    for (index, object) in objects.iter().enumerate() {
        let same = |other: &Step| object.is_ok() && other.session == steps[index].session;
        let admitted = match steps[..index].iter().position(same) {
            Some(first) => Err(Fail::new(Status::Busy, format!("the session of step {first}: a batch has each once"))),
            None => admit(&steps[index], index, object),
        };
        match admitted {
            Ok(member) => members.push(member),
            Err(fail) => fails.push((index, fail)),
        }
    }
    let Some(engine) = members.first().map(|m| m.object.engine.clone()) else { return Ok(()) };
    if let Some(at) = members.iter().position(|m| !Arc::ptr_eq(&m.object.engine, &engine)) {
        let (first, other) = (members[0].index, members[at].index);
        return Err(Fail::usage(format!("steps {first} and {other} are of two engines; a batch is of one")));
    }
    // Nobody's any more, so that they are not taken out of the buffers.
    members.iter_mut().for_each(|member| member.state.logits = None);
    engine.with_buffers(members.len(), |buffers| {
        let decoded = decode(&mut members, buffers, &mut |i, fail| fails.push((i, fail)));
        if let Err(fail) = decoded {
            fails.extend(members.iter().map(|m| (m.index, fail.clone())));
            return Ok(());
        }
        for (i, member) in members.iter_mut().enumerate() {
            match finish(member, i, buffers) {
                Ok(next) => steps[member.index].next = next,
                Err(fail) => fails.push((member.index, fail)),
            }
        }
        Ok(())
    })
}
