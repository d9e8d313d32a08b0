"""Who plays: agents from files, behaviour policies and functions, behind one interface."""
