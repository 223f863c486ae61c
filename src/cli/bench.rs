use super::args::BenchArgs;
use specache::error::Result;
pub fn run(_args: BenchArgs) -> Result<()> {
    Ok(())
}
