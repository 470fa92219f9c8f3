"""The daemon as a process: its log, its service manager, its open files, its garbage, its event loop."""
