-- What an event is about beyond its reason, for people: which recovery point a
-- sandbox fell back to, why it did not wake. '' is nothing more to say.

-- +goose Up

ALTER TABLE sandbox_events ADD COLUMN detail TEXT NOT NULL DEFAULT '';
