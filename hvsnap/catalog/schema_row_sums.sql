-- CRC-32 over a row's other columns (row_sums.py). NULL: of an earlier version; the next start writes it.
ALTER TABLE disks ADD COLUMN row_sum INTEGER;
ALTER TABLE snapshots ADD COLUMN row_sum INTEGER;
ALTER TABLE policies ADD COLUMN row_sum INTEGER;
ALTER TABLE images ADD COLUMN row_sum INTEGER;
ALTER TABLE origins ADD COLUMN row_sum INTEGER;
ALTER TABLE carry ADD COLUMN row_sum INTEGER;
ALTER TABLE operations ADD COLUMN row_sum INTEGER;
