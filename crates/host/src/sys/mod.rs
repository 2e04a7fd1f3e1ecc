//! System calls that have no safe wrapper elsewhere: the only `unsafe` code of the project.

pub(crate) mod inject;
pub(crate) mod session;
pub(crate) mod track;
