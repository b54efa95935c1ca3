"""The two frozen IR levels: `attention` says what, `tile` says how."""
