"""Backends of the ops: one module each (`eager`, `cpp`, `triton`), one function per op; `alro_fast.ops` chooses."""
