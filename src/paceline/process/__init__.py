"""Processes: started, watched, drained, ended; what they log."""
