"""`make bench`: the measurements that need no GPU, one after the other."""

from hack.bench import job

if __name__ == "__main__":
    job.main()
