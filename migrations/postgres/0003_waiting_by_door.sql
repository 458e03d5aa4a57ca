-- The admission window counts the waiting jobs of one door: a hundred thousand of another cost it nothing.
CREATE INDEX jobs_waiting_by_door ON jobs (door) WHERE state = 'queued';
