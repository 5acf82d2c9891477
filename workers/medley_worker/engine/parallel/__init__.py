"""An engine on several devices of one host: one process a rank. Rank 0 is the engine; the others follow its steps."""
