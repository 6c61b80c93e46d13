//! The number of the tables' state: raised after every change, so that no flow goes by what was true before it.

use std::sync::Mutex;

use aya::maps::{Array, Map, MapData};

use crate::{Error, Result, lock};

/// The number, in a map of its own.
pub(crate) struct Generation(Mutex<Array<MapData, u32>>);

impl Generation {
    pub(crate) fn new(map: Map) -> Result<Self> {
        Ok(Self(Mutex::new(Array::try_from(map)?)))
    }

    /// Makes a change and announces it, also when it failed in the middle.
    pub(crate) fn after<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let changed = change();
        let raised = self.raise();
        let value = changed?;
        raised?;
        Ok(value)
    }

    /// Makes what flows have found until now be looked up again.
    pub(crate) fn raise(&self) -> Result<()> {
        let mut map = lock(&self.0);
        let now = map.get(&0, 0).map_err(|e| Error::map("GENERATION", e))?;
        // 0 is what flows without a route have.
        let next = now.checked_add(1).unwrap_or(1);
        map.set(0, next, 0).map_err(|e| Error::map("GENERATION", e))
    }
}
