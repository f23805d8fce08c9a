"""Boards: TVM's tracker and sessions, the board server, and emulated boards."""
