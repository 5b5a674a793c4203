"""In place of a rank: a process that neither reads nor says anything."""

import threading

if __name__ == "__main__":
    threading.Event().wait()
