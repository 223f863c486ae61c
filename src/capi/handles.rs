//! Handles: names of engines and sessions in a table of the process. A name is never used twice and never dereferenced, so
//! a stale one, or one of another kind, is an error. Whoever is in a call holds a reference: freeing takes the name away, and
//! the last user frees the memory.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::engine::EngineObject;
use super::session::SessionObject;
use super::status::{Fail, Result, Status};

/// `specache_engine`: only pointers to it exist, which are names.
pub enum EngineHandle {}
/// `specache_session`: as above.
pub enum SessionHandle {}

/// What a name stands for.
#[derive(Clone)]
enum Object {
    Engine(Arc<EngineObject>),
    Session(Arc<SessionObject>),
}

struct Table {
    last: usize,
    objects: BTreeMap<usize, Object>,
}

static TABLE: RwLock<Table> = RwLock::new(Table { last: 0, objects: BTreeMap::new() });

/// Names are as far apart as allocations would be, and no address that a process can have: one that is dereferenced by
/// mistake faults at once.
fn pointer(number: usize) -> usize {
    (1 << 63) | (number << 4)
}

fn insert(object: Object) -> usize {
    let mut table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
    table.last += 1;
    let name = pointer(table.last);
    table.objects.insert(name, object);
    name
}

fn find(name: usize) -> Option<Object> {
    TABLE.read().unwrap_or_else(PoisonError::into_inner).objects.get(&name).cloned()
}

/// Takes a name out if it is of the right kind. The object is dropped by the caller, outside the lock: that may take a while.
fn remove(name: usize, kind: impl Fn(&Object) -> bool) -> Option<Object> {
    let mut table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
    if table.objects.get(&name).is_some_and(kind) { table.objects.remove(&name) } else { None }
}

fn bad(name: usize, kind: &str) -> Fail {
    let what = match name {
        0 => "is NULL".to_string(),
        _ => format!("{name:#x} was freed, or never was {kind}"),
    };
    Fail::new(Status::Handle, format!("the handle of {kind} {what}"))
}

pub(super) fn add_engine(engine: EngineObject) -> *mut EngineHandle {
    insert(Object::Engine(Arc::new(engine))) as *mut EngineHandle
}

pub(super) fn add_session(session: SessionObject) -> *mut SessionHandle {
    insert(Object::Session(Arc::new(session))) as *mut SessionHandle
}

pub(super) fn engine(handle: *mut EngineHandle) -> Result<Arc<EngineObject>> {
    match find(handle as usize) {
        Some(Object::Engine(engine)) => Ok(engine),
        _ => Err(bad(handle as usize, "an engine")),
    }
}

pub(super) fn session(handle: *mut SessionHandle) -> Result<Arc<SessionObject>> {
    match find(handle as usize) {
        Some(Object::Session(session)) => Ok(session),
        _ => Err(bad(handle as usize, "a session")),
    }
}

pub(super) fn free_engine(handle: *mut EngineHandle) {
    drop(remove(handle as usize, |object| matches!(object, Object::Engine(_))));
}

pub(super) fn free_session(handle: *mut SessionHandle) {
    drop(remove(handle as usize, |object| matches!(object, Object::Session(_))));
}
