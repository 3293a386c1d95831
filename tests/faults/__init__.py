"""What happens under which fault: the table (``table``), from which tests and ``docs/faults.md`` come."""
