//! Values that streams work on: away until the event, and then back.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::order::Site;
use super::{Device, Event};

/// A value that is either at rest with its owner or away on a stream. While it is away nobody can read it, and it is not
/// freed: the stream's job holds it. Sending it and having it back allocates nothing.
pub struct InFlight<T> {
    /// `None` exactly while it is away.
    at_rest: Option<T>,
    cell: Arc<Cell<T>>,
}

/// Where a value is while it is away. Its job has the other reference ([`Carried`]).
struct Cell<T> {
    freight: Mutex<Freight<T>>,
    /// When the value may be had back; set as soon as its last job is launched. Apart from the freight, which a job may
    /// hold for as long as a copy takes.
    event: Mutex<Option<Event>>,
}

struct Freight<T> {
    value: Option<T>,
    /// Why the value is not what it was to become. Set until its job says otherwise, so that a panic cannot be missed.
    failure: Option<Cow<'static, str>>,
}

const PANICKED: &str = "a thread of the copy panicked";

impl<T> Cell<T> {
    /// A job that panicked has left its reason in `failure`.
    fn lock(&self) -> MutexGuard<'_, Freight<T>> {
        self.freight.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn event(&self) -> MutexGuard<'_, Option<Event>> {
        self.event.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl<T> InFlight<T> {
    /// A value at rest.
    pub fn new(value: T) -> InFlight<T> {
        let freight = Mutex::new(Freight { value: None, failure: None });
        InFlight { at_rest: Some(value), cell: Arc::new(Cell { freight, event: Mutex::new(None) }) }
    }

    /// Whether it is away.
    pub fn is_away(&self) -> bool {
        self.at_rest.is_none()
    }

    /// Sends it away. Whoever launches the job says when it is back: [`Carried::depart`].
    ///
    /// # Panics
    /// If it is away already.
    pub fn send(&mut self) -> Carried<T> {
        let value = self.at_rest.take().expect("a value that is sent is at rest");
        *self.cell.event() = None;
        *self.cell.lock() = Freight { value: Some(value), failure: Some(PANICKED.into()) };
        Carried(self.cell.clone())
    }

    /// Waits until it is back, if it is away. `Err` says why its job failed: then what the job was to write is not to be
    /// relied on. The time that the caller spent waiting is added to `exposed`. `site` names the place in the program;
    /// `None` where a wait before has waited for the value too. A value that was sent and for which no job was launched
    /// comes back as one whose job failed.
    pub fn arrive(&mut self, device: &Device, site: Option<Site>, exposed: &mut Duration) -> Result<(), String> {
        if self.at_rest.is_some() {
            return Ok(());
        }
        let event = *self.cell.event();
        match (event, site) {
            (Some(event), Some(site)) => *exposed += device.wait(event, site),
            // The compute stream waits already. The host must not, where that stream is a GPU's queue.
            (Some(event), None) if device.gpu().is_none() => device.finish(event),
            _ => {}
        }
        let mut freight = self.cell.lock();
        self.at_rest = freight.value.take();
        match freight.failure.take() {
            Some(why) => Err(why.into_owned()),
            None => Ok(()),
        }
    }

    /// The value.
    ///
    /// # Panics
    /// While it is away: call [`InFlight::arrive`] first.
    pub fn get(&self) -> &T {
        self.at_rest.as_ref().expect("a value that is read is at rest")
    }

    /// The value, to write.
    ///
    /// # Panics
    /// As [`InFlight::get`].
    pub fn get_mut(&mut self) -> &mut T {
        self.at_rest.as_mut().expect("a value that is written is at rest")
    }
}

impl<T> InFlight<T> {
    /// The value, at rest.
    ///
    /// # Panics
    /// As [`InFlight::get`].
    pub fn into_inner(self) -> T {
        self.at_rest.expect("a value that is taken is at rest")
    }
}

/// A job's hold on a value.
pub struct Carried<T>(Arc<Cell<T>>);

impl<T> Clone for Carried<T> {
    fn clone(&self) -> Self {
        Carried(self.0.clone())
    }
}

impl<T> Carried<T> {
    /// The owner may have the value back after this event.
    pub fn depart(&self, event: Event) {
        *self.0.event() = Some(event);
    }

    /// Works on the value. What fails, the owner hears of.
    pub fn work(&self, work: impl FnOnce(&mut T) -> Result<(), String>) {
        let mut freight = self.0.lock();
        let value = freight.value.as_mut().expect("away until the event has passed");
        freight.failure = work(value).err().map(Cow::Owned);
    }

    /// Looks at the value, before any job works on it.
    pub fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(self.0.lock().value.as_ref().expect("away until the event has passed"))
    }
}
