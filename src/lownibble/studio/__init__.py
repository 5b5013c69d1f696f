"""The page that plans, starts and watches all of it: `lownibble studio`."""
