//! Forks, truncations and ends of sequences: the same as if the tokens had come another way.

mod common;

use common::tiny::{Tiny, ids};
use common::{device, kv, max_difference};
use specache::kv::KvMode;
use specache::{Buffers, Engine, Next, Prompt, Session};

const TINY: Tiny = Tiny { head_dim: 32, n_kv_heads: 2, group_heads: 3, n_layers: 3, window: None };
const WINDOW: Tiny = Tiny { window: Some(90), ..TINY };

fn prefill(engine: &Engine, session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    engine.prefill(&mut [Prompt { session, tokens }], &mut Buffers::default()).unwrap().remove(0).unwrap()
}

fn decode(engine: &Engine, session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut buffers = Buffers::default();
    let mut row = |&token: &u32| {
        engine.decode(&mut [Next { session: &mut *session, token }], &mut buffers).unwrap();
        buffers.logits(0).unwrap().to_vec()
    };
    tokens.iter().map(&mut row).collect()
}

/// However many tokens are forgotten, what is left has the same bits: those of a session that never went further. At every
/// length around the borders of pages and residual.
#[test]
fn truncation_is_as_if_the_rest_had_never_been() {
    let lengths = [299, 226, 225, 224, 200, 161, 160, 128, 98, 97, 96, 65, 64, 63, 33, 32, 21];
    truncations(33, 300, &lengths);
}

/// The same where the residual is several pages long, so that as many come back from the host.
#[test]
fn deep_truncations_bring_pages_back() {
    truncations(200, 560, &[559, 521, 520, 519, 448, 393, 392, 329, 264, 200, 130, 21]);
}

/// Tokens are fed one by one, as prompts of other lengths round differently.
fn truncations(residual_len: usize, most: usize, lengths: &[usize]) {
    let tokens = ids(2, most);
    for model in [TINY, WINDOW] {
        let engine = Engine::new(model.model(), device(2)).unwrap();
        for mode in [KvMode::Full, KvMode::Offload, KvMode::Fetch, KvMode::SpeCache] {
            let kv = kv(mode, 1, 32, residual_len, 7);
            let fed = |n: usize| {
                let mut session = engine.session(kv, most + 60).unwrap();
                prefill(&engine, &mut session, &tokens[..20]);
                decode(&engine, &mut session, &tokens[20..n]);
                session
            };
            let mut long = fed(most);
            for &n in lengths {
                // From the end of the long one, and from that of the truncation before.
                let mut fork = long.fork().unwrap();
                long.truncate(n).unwrap();
                fork.truncate(n).unwrap();
                assert_eq!(fork.n_tokens(), n);
                let mut short = fed(n);
                short.truncate(n).unwrap();
                let what = format!("{mode:?}, R = {residual_len}, window {:?}, {n} tokens", model.window);
                let steps = [&mut fork, &mut short].map(|session| decode(&engine, session, &tokens[most - 40..]));
                assert!(steps[0] == steps[1], "{what}");
                // And a prompt behind them.
                let prompts = [&mut fork, &mut short].map(|session| prefill(&engine, session, &tokens[100..120]));
                assert!(prompts[0] == prompts[1], "{what}, a second prompt");
            }
        }
    }
}

/// A session that is truncated goes on as after a prefill of what is left: exact attention over it, a new pre-decode.
#[test]
fn a_truncated_session_is_as_after_a_prefill() {
    let tokens = ids(2, 400);
    let engine = Engine::new(TINY.model(), device(2)).unwrap();
    for (mode, top_k) in [(KvMode::Full, 0), (KvMode::Offload, 0), (KvMode::SpeCache, 400), (KvMode::Fetch, 400)] {
        let kv = kv(mode, 2, 32, 33, top_k);
        for n in [33, 97, 128, 225] {
            let mut long = engine.session(kv, 400).unwrap();
            prefill(&engine, &mut long, &tokens[..300]);
            decode(&engine, &mut long, &tokens[300..330]);
            long.truncate(n).unwrap();
            let mut short = engine.session(kv, 400).unwrap();
            prefill(&engine, &mut short, &tokens[..n]);
            let [long, short] = [&mut long, &mut short].map(|session| decode(&engine, session, &tokens[340..380]));
            let difference = long.iter().zip(&short).map(|(a, b)| max_difference(a, b)).fold(0.0, f32::max);
            // A K or V between two bf16 numbers is rounded by the order of a sum, which depends on the prompt's length.
            assert!(difference < 0.05, "{mode:?}, {n} tokens: {difference}");
        }
    }
}

/// What cannot be kept is refused, and nothing has changed.
#[test]
fn truncations_that_cannot_be() {
    let tokens = ids(2, 400);
    let engine = Engine::new(TINY.model(), device(1)).unwrap();
    let mut session = engine.session(kv(KvMode::Kivi, 1, 32, 33, 0), 400).unwrap();
    prefill(&engine, &mut session, &tokens[..300]);
    for (n, words) in [(0, "from 1 to the 300"), (301, "from 1 to the 300"), (288, "keep at least 289")] {
        let error = session.truncate(n).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(words), "{error}");
        assert_eq!(session.n_tokens(), 300, "nothing has changed");
    }
    session.truncate(289).unwrap();
    decode(&engine, &mut session, &tokens[..20]);
}

/// Each branch of a fork has the bits of a session of its own, whatever the other does, and in which order they end.
#[test]
fn branches_do_not_disturb_each_other() {
    let tokens = ids(4, 500);
    let engine = Engine::new(TINY.model(), device(2)).unwrap();
    let page_bytes = engine.host_pages().page_bytes;
    assert!(page_bytes > 0);
    for mode in KvMode::ALL {
        let kv = kv(mode, 1, 32, 33, 7);
        let lone = |branch: &[u32]| {
            let mut session = engine.session(kv, 400).unwrap();
            prefill(&engine, &mut session, &tokens[..230]);
            let mut rows = decode(&engine, &mut session, &tokens[230..250]);
            rows.extend(decode(&engine, &mut session, branch));
            rows.split_off(20)
        };
        let branches = [&tokens[250..330], &tokens[330..410], &tokens[410..490]];
        let expected = branches.map(lone);
        let mut trunk = engine.session(kv, 400).unwrap();
        prefill(&engine, &mut trunk, &tokens[..230]);
        decode(&engine, &mut trunk, &tokens[230..250]);
        let before = engine.host_pages().leased;
        let (mut one, mut two) = (trunk.fork().unwrap(), trunk.fork().unwrap());
        assert_eq!(engine.host_pages().leased, before, "complete pages are shared");
        let mut rows = [vec![], vec![], vec![]];
        for at in (0..80).step_by(8) {
            for (i, session) in [&mut trunk, &mut one, &mut two].into_iter().enumerate() {
                rows[i].extend(decode(&engine, session, &branches[i][at..at + 8]));
            }
        }
        assert!(rows == expected, "{mode:?}");
        // The trunk ends first; a branch is cut back to what it shared, and goes another way.
        drop(trunk);
        if mode != KvMode::Kivi {
            one.truncate(250).unwrap();
            let mut fresh = engine.session(kv, 400).unwrap();
            prefill(&engine, &mut fresh, &tokens[..230]);
            decode(&engine, &mut fresh, &tokens[230..250]);
            fresh.truncate(250).unwrap();
            let ways = [&mut one, &mut fresh].map(|session| decode(&engine, session, branches[1]));
            assert!(ways[0] == ways[1], "{mode:?}, after a truncation");
        }
        drop((one, two));
        let pages = engine.host_pages();
        assert_eq!((pages.leased, pages.reserved), (0, 0), "{mode:?}");
    }
}

/// A fork that ends on another thread while pages are truncated that it shares: no page stays promised for nothing.
#[test]
fn a_fork_may_end_while_the_other_is_truncated() {
    let model = Tiny { head_dim: 32, n_kv_heads: 1, group_heads: 1, n_layers: 8, window: None };
    let engine = Engine::new(model.model(), device(1)).unwrap();
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let tokens = ids(3, 2000);
    let mut session = engine.session(kv, 2000).unwrap();
    prefill(&engine, &mut session, &tokens[..1900]);
    let held = || engine.host_pages().leased + engine.host_pages().reserved;
    let alone = held();
    for round in 0..60 {
        let fork = session.fork().unwrap();
        let begin = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                begin.wait();
                (0..300 * round).for_each(|_| std::hint::spin_loop());
                drop(fork);
            });
            begin.wait();
            session.truncate(100).unwrap();
        });
        assert_eq!(held(), alone, "round {round}");
        prefill(&engine, &mut session, &tokens[100..1900]);
    }
}
