"""The Python class of examples/python, for tests/capi.rs:  capi.py MODEL PROMPT_FILE"""

import faulthandler
import os
import sys
import threading
import time

import specache
from specache import Engine

faulthandler.dump_traceback_later(300, exit=True)  # whoever waits for ever is an error
model, prompt = sys.argv[1], open(sys.argv[2]).read()
log = []


def fails(status, words, call):
    try:
        call()
    except specache.Error as e:
        assert e.status == status and words in str(e), (e.status, str(e))
    else:
        raise AssertionError(f"no error with {words!r}")


engine = Engine(model, device="cpu", log=lambda level, message: log.append((level, message)), log_level=4)
assert log[0][0] == 3 and "recall" in log[0][1], log
assert "recall" in repr(engine)
ids = engine.tokenize(prompt)
assert engine.detokenize(ids) == prompt
assert engine.info.vocab_size == 1536

session = engine.session(1200, kv="specache", bits=1, top_k=16)
session.prefill(prompt)
assert session.tokens() == ids
logits = session.logits()
assert len(logits) == 1536 and abs(sum(logits)) < 1e6
try:
    import numpy
    assert isinstance(logits, numpy.ndarray) and logits.dtype == numpy.float32
    session_ids = numpy.array(ids)  # ids may be one, too
except ImportError:
    assert "SPECACHE_REQUIRE_TOOLS" not in os.environ, "numpy is not there"
    assert isinstance(logits, list)
    session_ids = ids
fork = session.fork()
given = session.generate_ids(20, ignore_eos=True)
assert max(range(1536), key=logits.__getitem__) == given[0]
assert fork.generate_ids(20, ignore_eos=True) == given

# Fed by hand.
fork.truncate(len(ids) - 1)
fork.step(ids[-1])
for token in given:
    row = fork.logits()
    assert max(range(1536), key=row.__getitem__) == token
    fork.step(token)

# A loop that is left, and goes on.
fork.reset()
fork.prefill(session_ids)
pieces = fork.generate(500, ignore_eos=True)
next(pieces)
fails(7, "another call", fork.tokens)
time.sleep(0.3)  # it waits for whoever takes the pieces
pieces.close()
assert len(fork.tokens()) < len(ids) + 20, len(fork.tokens())
fork.generate_ids(3)
assert fork.tokens()[len(ids):] == given[: len(fork.tokens()) - len(ids)]



# Sessions and loops are closed in any order, and more than once.
def begun(engine):
    one = engine.session(5000, kv="kivi")
    one.prefill(ids[:3])
    pieces = one.generate(4000, ignore_eos=True)
    next(pieces)
    return one, pieces


held = engine.memory()["device_kv_bytes"]
one, pieces = begun(engine)
one.close()
one.close()
fails(8, "NULL", one.tokens)
until = time.monotonic() + 60
while engine.memory()["device_kv_bytes"] > held:  # though nobody takes what is left
    assert time.monotonic() < until, engine.memory()
    time.sleep(0.01)
assert len(list(pieces)) < 20
one, pieces = begun(engine)
one.close()
pieces.close()
pieces.close()
other = Engine(model, device="cpu", threads=1)
one, pieces = begun(other)
other.close()
other.close()
pieces.close()
assert len(one.generate_ids(3, ignore_eos=True)) == 3
one.close()
fails(8, "NULL", other.memory)

# The garbage collector may leave a loop on a thread that holds a lock which other threads need for their end.
one, pieces = begun(engine)
with threading._active_limbo_lock:
    del pieces
assert len(one.tokens()) < 20
one.close()


# Numbers that C would cut off, and words that it would end.
def raises(kind, words, call):
    try:
        call()
    except kind as e:
        assert words in str(e), str(e)
    else:
        raise AssertionError(f"no {kind.__name__}")


held = fork.tokens()
raises(OverflowError, "", lambda: fork.prefill([1, 2**33]))
raises(OverflowError, "", lambda: fork.prefill([-1]))
raises(TypeError, "", lambda: fork.prefill([1.5]))
raises(OverflowError, "", lambda: engine.detokenize([2**32]))
for no_ids in (b"\1\0\0\0", bytearray(4), memoryview(bytes(4)), "\1\0\0\0"):
    raises(TypeError, "a list of numbers, not " + type(no_ids).__name__, lambda: engine.detokenize(no_ids))
raises(TypeError, "a list of numbers, not bytes", lambda: fork.prefill(b"\1\0\0\0"))
raises(OverflowError, "token 4294967296", lambda: fork.step(2**32))
raises(OverflowError, "n_tokens -1", lambda: fork.truncate(-1))
raises(OverflowError, "n_tokens", lambda: fork.generate_ids(2**64))
raises(OverflowError, "max_tokens", lambda: engine.session(2**64))
raises(OverflowError, "bits 4294967297", lambda: engine.session(10, bits=2**32 + 1))
raises(OverflowError, "seed -1", lambda: fork.sampling(seed=-1))
raises(OverflowError, "log_level", lambda: Engine(model, log_level=2**31))
raises(TypeError, "", lambda: engine.session(10, bits=1.5))
raises(ValueError, "kv 'nope': must be one of full", lambda: engine.session(10, kv="nope"))
raises(ValueError, "gather", lambda: Engine(model, gather="nope"))
raises(ValueError, "linear", lambda: Engine(model, linear="nope"))
raises(ValueError, "NUL", lambda: engine.chat_prompt([{"role": "user", "content": "a\0b"}]))
fails(2, "no chat template", lambda: fork.prefill_chat([{"role": "user", "content": "hi"}]))
assert fork.tokens() == held

# Sessions in a batch, and what an engine and its sessions say of themselves.
twins = [session.fork(), session.fork()]
feed = [given[-1], given[0]]
chosen, rows = specache.step_batch(twins, feed, logits=True)
for twin, token, row in zip(twins, chosen, rows):
    assert token == twin.sample() == max(range(1536), key=row.__getitem__) and len(twin.tokens()) == len(session.tokens()) + 1
assert specache.step_batch(twins, chosen) != chosen and specache.step_batch([], []) == []
raises(ValueError, "1 tokens for 2", lambda: specache.step_batch(twins, [1]))
raises(OverflowError, "", lambda: specache.step_batch(twins, [1, 2**32]))
raises(TypeError, "a list of numbers", lambda: specache.step_batch(twins, bytes(8)))
assert [layer["hits_of"] > 0 for layer in session.layer_stats()] == [True] * 4
assert engine.eos_tokens() and all(0 <= id < 1536 for id in engine.eos_tokens())
memory, planned = engine.memory(), specache.plan(model, 1200, bits=1, top_k=16)
assert memory["device_kv_bytes"] >= 2 * planned["device_bytes"] > 0 and memory["device_budget"] == 2**64 - 1, memory
assert memory["device_bytes"] == memory["device_kv_bytes"] and memory["host_pages_leased"] > 0
engine.measure_waits()
fails(2, "set `trace`", engine.trace)
traced = Engine(model, device="cpu", trace=1, threads=1)
traced.trace()
one = traced.session(64)
one.prefill([1, 2, 3])
traced.trace(False)
traced.trace_write(sys.argv[3])
assert os.path.getsize(sys.argv[3]) > 1000
os.remove(sys.argv[3])

# Another thread ends it.
fork.reserve(4000)
timer = threading.Timer(0.05, fork.cancel)
timer.start()
n = len(fork.generate_ids(10**9, ignore_eos=True))
timer.join()
assert n < 3000


# An exception of a callback comes through.
def boom(_):
    raise KeyError("mine")


try:
    fork.generate_ids(5, on_text=boom)
except KeyError:
    pass
else:
    raise AssertionError("no KeyError")

fork.sampling(temperature=0.8, seed=3)
fails(2, "temperature -1", lambda: fork.sampling(temperature=-1))
fails(2, "bits 3", lambda: engine.session(10, bits=3))
fails(3, "no such folder", lambda: Engine("/no/such/folder"))
try:
    engine.session(10, bitz=3)
except TypeError as e:
    assert "bitz" in str(e)
else:
    raise AssertionError("no TypeError")
stats = session.stats()
assert stats["steps"] == stats["exposed_steps"] == 19 and 0 < stats["hit_rate"] <= 1, stats
session.close()
fails(8, "NULL", session.tokens)
fork.close()
engine.close()
print("ok")
