"""The lab's certificate authority, enrolment of devices, and signatures of bundles."""
