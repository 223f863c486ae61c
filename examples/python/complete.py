"""Streams a completion, then looks at the logits:  python3 complete.py MODEL PROMPT [TOKENS]"""

import sys

from specache import Engine

if len(sys.argv) < 3:
    sys.exit(__doc__)
model, prompt = sys.argv[1:3]
n = int(sys.argv[3]) if len(sys.argv) > 3 else 64

with Engine(model) as engine:
    ids = engine.tokenize(prompt)
    with engine.session(max_tokens=len(ids) + n) as session:
        session.prefill(ids)
        logits = session.logits()
        for piece in session.generate(n):
            print(piece, end="", flush=True)
        print()
        best = max(range(len(logits)), key=logits.__getitem__)
        stats = session.stats()
        print(f"first token: {engine.detokenize([best])!r} of {len(logits)}; {stats['n_tokens']} tokens, "
              f"{stats['host_bytes']} bytes of them on the host, {stats['fetched_bytes']} bytes fetched", file=sys.stderr)
