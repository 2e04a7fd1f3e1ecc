//! Users of this machine, as passwd(5) and group(5) name them.

use std::fs;

/// A user without privileges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Name.
    pub name: String,
    /// User ID.
    pub uid: u32,
    /// Its own group's ID.
    pub gid: u32,
}

/// Who owns nothing, see user_namespaces(7): where there is no user of that name either.
const NOBODY: u32 = 65_534;

impl User {
    /// The user of that name; none if there is none in `/etc/passwd`.
    pub fn find(name: &str) -> Option<Self> {
        find_in(&fs::read_to_string("/etc/passwd").ok()?, name)
    }

    /// The user that owns nothing.
    pub fn nobody() -> Self {
        Self::find("nobody").unwrap_or_else(|| Self {
            name: "nobody".to_owned(),
            uid: NOBODY,
            gid: NOBODY,
        })
    }
}

fn find_in(passwd: &str, name: &str) -> Option<User> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next().filter(|found| *found == name)?;
        let mut numbers = fields.skip(1).map(str::parse);
        Some(User {
            name: found.to_owned(),
            uid: numbers.next()?.ok()?,
            gid: numbers.next()?.ok()?,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_their_whole_name() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\nodd:x:y:1::/:\nqemu:x:107:36:QEMU,,,:/:/bin/false\n";
        let user = find_in(passwd, "qemu").unwrap();
        assert_eq!((user.uid, user.gid), (107, 36));
        for name in ["qem", "odd", "", "x"] {
            assert_eq!(find_in(passwd, name), None);
        }
    }
}
