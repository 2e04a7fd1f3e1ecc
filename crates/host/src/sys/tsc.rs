//! The processor's counter of time.

/// What the time stamp counter shows, in ticks; nothing on processors that have none.
#[must_use]
pub(crate) fn tsc() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the instruction reads a register and touches no memory. A process may be forbidden it by
        // PR_SET_TSC, which only the process itself or who started it can have asked for; then it ends by SIGSEGV.
        Some(unsafe { core::arch::x86_64::_rdtsc() })
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}
