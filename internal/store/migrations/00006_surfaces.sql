-- What becomes of an ephemeral sandbox when its timeout is over, and what the surface that
-- a sandbox was made through keeps with it. Those that are there are destroyed, as they were
-- promised; of a persistent one the first is ''.

-- +goose Up

ALTER TABLE sandboxes ADD COLUMN at_end TEXT NOT NULL DEFAULT '';
UPDATE sandboxes SET at_end = 'destroy' WHERE mode = 'ephemeral';
ALTER TABLE sandboxes ADD COLUMN surface TEXT NOT NULL DEFAULT '';
