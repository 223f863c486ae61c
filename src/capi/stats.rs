//! What a session has measured.

use super::handles::{self, SessionHandle};
use super::memory::give;
use super::status::guard;
use super::structs::{self, LayerStats, SessionStats};

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_get_stats(session: *mut SessionHandle, stats: *mut SessionStats) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        let mut state = object.lock()?;
        let n_tokens = state.tokens.len() as u64; // without those of a call that failed
        let session = state.session()?;
        let (measured, bytes) = (session.stats(), session.cache_bytes());
        let filled = SessionStats {
            n_layers: measured.hits.len() as u32,
            n_tokens,
            max_tokens: session.max_tokens() as u64,
            steps: measured.steps,
            hit_rate: measured.hit_rate().unwrap_or(f64::NAN),
            acceptance: measured.acceptance().unwrap_or(f64::NAN),
            accepted: measured.accepted,
            compared: measured.compared,
            fetched_bytes: measured.fetched_bytes,
            pre_decode_bytes: measured.pre_decode_bytes,
            offloaded_bytes: measured.offloaded_bytes,
            exposed_ns: u64::try_from(measured.exposed.as_nanos()).unwrap_or(u64::MAX),
            exposed_steps: measured.exposed_steps,
            packed_bytes: bytes.packed,
            wide_bytes: bytes.wide,
            slot_bytes: bytes.slots,
            load_bytes: bytes.loads,
            host_bytes: bytes.host,
            ..structs::Sized32::defaults()
        };
        // SAFETY: the header's contract.
        unsafe { structs::write(stats, &filled) }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_layer_stats(
    session: *mut SessionHandle,
    layers: *mut LayerStats,
    capacity: usize,
    n: *mut usize,
) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        let mut state = object.lock()?;
        let measured = state.session()?.stats();
        let layer = |(&(hits, hits_of), &(fetched, selected)): (&(u64, u64), &(u64, u64))| LayerStats {
            hits,
            hits_of,
            fetched,
            selected,
        };
        let filled: Vec<_> = measured.hits.iter().zip(&measured.fetched).map(layer).collect();
        // SAFETY: the header's contract.
        unsafe { give(&filled, layers, capacity, n, "layers") }
    })
}
