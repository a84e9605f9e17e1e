-- A line of a build's log knows the line of the Dockerfile that its step is at. Lines of before know none, which is 0.

-- +goose Up

ALTER TABLE template_logs ADD COLUMN dockerfile_line INTEGER NOT NULL DEFAULT 0;
