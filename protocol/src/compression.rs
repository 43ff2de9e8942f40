//! The codecs of record batches, in the forms that Kafka's clients write and read, with bounded output.
//!
//! | codec | form written | also read |
//! |---|---|---|
//! | gzip | one member | several members |
//! | snappy | xerial's framing, 32 KiB blocks | raw snappy |
//! | lz4 | one frame, independent 64 KiB blocks, no checksums | linked blocks, larger blocks, checksums |
//! | zstd | one frame with its content size | several frames; windows up to 8 MiB |
//!
//! Decompression allocates in proportion to what really comes out, never to what the input claims: at most twice the
//! caller's cap, and the codec's own state, bounded by a constant: 8 MiB of window for zstd, 16 MiB of blocks for lz4
//! frames with the largest blocks (128 KiB for those that Kafka's clients write), 22 times the input for snappy.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::str::FromStr;

use zstd::zstd_safe;

/// A codec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Records as they are.
    #[default]
    None,
    /// Small and slow. Levels 1 to 9.
    Gzip,
    /// Quick, no levels.
    Snappy,
    /// Quick, no levels.
    Lz4,
    /// Small and rather quick. Levels -7 to 22.
    Zstd,
}

/// What went wrong in a codec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompressionError {
    /// The input is not of the codec's form.
    #[error("{codec}: {reason}")]
    Malformed {
        /// The codec.
        codec: Compression,
        /// What it says.
        reason: String,
    },
    /// The output would be larger than the caller allows.
    #[error("decompresses to more than {bytes_max} bytes")]
    TooLarge {
        /// The caller's cap.
        bytes_max: usize,
    },
}

/// A codec's name that is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown compression {0:?}: use none, gzip, snappy, lz4 or zstd")]
pub struct UnknownCompression(pub String);

/// log2 of the largest window that a zstd frame may ask for: 8 MiB, what RFC 8878 wants every decoder to support.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// Highest level whose window is no larger.
const ZSTD_LEVEL_OF_WINDOW_MAX: i32 = 19;
const ZSTD_LEVEL_DEFAULT: i32 = 3;
const GZIP_LEVEL_DEFAULT: u32 = 6;

const XERIAL_MAGIC: [u8; 8] = [0x82, b'S', b'N', b'A', b'P', b'P', b'Y', 0];
/// Magic, version and lowest compatible version (both 1).
const XERIAL_HEADER: [u8; 16] = [0x82, b'S', b'N', b'A', b'P', b'P', b'Y', 0, 0, 0, 0, 1, 0, 0, 0, 1];
const XERIAL_BLOCK_BYTES: usize = 32 * 1024;
/// A snappy element of 3 bytes writes at most 64: no block holds more than this many times its own size.
const SNAPPY_RATIO_MAX: usize = 22;
const LZ4_MAGIC: [u8; 4] = 0x184d_2204_u32.to_le_bytes();

impl Compression {
    /// All codecs.
    pub const ALL: [Self; 5] = [Self::None, Self::Gzip, Self::Snappy, Self::Lz4, Self::Zstd];

    /// Its number in a batch's attributes.
    pub const fn id(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Gzip => 1,
            Self::Snappy => 2,
            Self::Lz4 => 3,
            Self::Zstd => 4,
        }
    }

    /// The codec of a number in a batch's attributes.
    pub const fn from_id(id: u8) -> Option<Self> {
        Some(match id {
            0 => Self::None,
            1 => Self::Gzip,
            2 => Self::Snappy,
            3 => Self::Lz4,
            4 => Self::Zstd,
            _ => return None,
        })
    }

    /// Its name, as configs write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Compresses `input` and appends it to `out`. A level outside the codec's range is moved to its nearest; `None`
    /// is the codec's default.
    pub fn compress(self, level: Option<i32>, input: &[u8], out: &mut Vec<u8>) -> Result<(), CompressionError> {
        let done = match self {
            Self::None => {
                out.extend_from_slice(input);
                Ok(())
            }
            Self::Gzip => compress_gzip(level, input, out),
            Self::Snappy => compress_snappy(input, out),
            Self::Lz4 => compress_lz4(input, out),
            Self::Zstd => compress_zstd(level, input, out),
        };
        done.map_err(|error| self.malformed(&error))
    }

    /// Decompresses the whole of `input`, which must come to at most `bytes_max` bytes.
    pub fn decompress(self, input: &[u8], bytes_max: usize) -> Result<Vec<u8>, CompressionError> {
        self.with_reader(input, bytes_max, |reader| {
            // Most batches shrink to a quarter or less; the vector doubles from there as bytes really come.
            let mut out = Vec::with_capacity((input.len().saturating_mul(4)).min(bytes_max).min(16 << 20));
            // One byte more than allowed tells too much from just enough.
            let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
            reader.take(limit).read_to_end(&mut out).map_err(|error| self.read_error(error, bytes_max))?;
            if out.len() > bytes_max {
                return Err(CompressionError::TooLarge { bytes_max });
            }
            Ok(out)
        })
    }

    /// Runs `read` over the decompressed stream of `input`. The stream ends with an error unless all of the input was
    /// used. Snappy blocks larger than `bytes_max` are refused; the caller counts the rest.
    pub(crate) fn with_reader<T>(
        self,
        mut input: &[u8],
        bytes_max: usize,
        read: impl FnOnce(&mut dyn Read) -> Result<T, CompressionError>,
    ) -> Result<T, CompressionError> {
        match self {
            Self::None => read(&mut input),
            Self::Gzip => read(&mut flate2::bufread::MultiGzDecoder::new(input)),
            Self::Snappy => read(&mut SnappyReader::new(input, bytes_max)),
            Self::Lz4 => read(&mut Lz4Reader::new(input).map_err(|error| self.malformed(&error))?),
            Self::Zstd => ZSTD_READING.with_borrow_mut(|context| {
                let context = context.get_or_insert_with(zstd_safe::DCtx::create);
                context
                    .reset(zstd_safe::ResetDirective::SessionAndParameters)
                    .and_then(|_| context.set_parameter(zstd_safe::DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX)))
                    .map_err(|code| self.malformed(&io::Error::other(zstd_safe::get_error_name(code))))?;
                read(&mut zstd::stream::read::Decoder::with_context(input, context))
            }),
        }
    }

    /// The error of a stream that [`Self::with_reader`] gave.
    pub(crate) fn read_error(self, error: io::Error, bytes_max: usize) -> CompressionError {
        if error.kind() == io::ErrorKind::FileTooLarge {
            CompressionError::TooLarge { bytes_max }
        } else {
            self.malformed(&error)
        }
    }

    fn malformed(self, error: &io::Error) -> CompressionError {
        CompressionError::Malformed { codec: self, reason: error.to_string() }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|codec| codec.as_str() == text).ok_or_else(|| UnknownCompression(text.to_owned()))
    }
}

thread_local! {
    // Making a zstd context costs more than a small batch; each is used by one call at a time, and never across one.
    static ZSTD_READING: RefCell<Option<zstd_safe::DCtx<'static>>> = const { RefCell::new(None) };
    static ZSTD_WRITING: RefCell<Option<zstd_safe::CCtx<'static>>> = const { RefCell::new(None) };
    static SNAPPY_WRITING: RefCell<snap::raw::Encoder> = RefCell::new(snap::raw::Encoder::new());
}

fn compress_gzip(level: Option<i32>, input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    let level = level.map_or(GZIP_LEVEL_DEFAULT, |level| level.clamp(1, 9) as u32);
    let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::new(level));
    encoder.write_all(input)?;
    encoder.finish().map(|_| ())
}

fn compress_snappy(input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    out.extend_from_slice(&XERIAL_HEADER);
    SNAPPY_WRITING.with_borrow_mut(|encoder| {
        for block in input.chunks(XERIAL_BLOCK_BYTES) {
            let at = out.len();
            out.resize(at + 4 + snap::raw::max_compress_len(block.len()), 0);
            let bytes = encoder.compress(block, &mut out[at + 4..]).map_err(io::Error::other)?;
            out[at..at + 4].copy_from_slice(&(bytes as u32).to_be_bytes());
            out.truncate(at + 4 + bytes);
        }
        Ok(())
    })
}

fn compress_lz4(input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
    let info = FrameInfo::new().block_size(BlockSize::Max64KB).block_mode(BlockMode::Independent);
    let mut encoder = FrameEncoder::with_frame_info(info, out);
    encoder.write_all(input)?;
    encoder.finish().map(|_| ()).map_err(io::Error::other)
}

fn compress_zstd(level: Option<i32>, input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    use zstd_safe::{CParameter, ResetDirective};
    let level = level.unwrap_or(ZSTD_LEVEL_DEFAULT).clamp(-7, 22);
    let at = out.len();
    out.resize(at + zstd_safe::compress_bound(input.len()), 0);
    let bytes = ZSTD_WRITING
        .with_borrow_mut(|context| {
            let context = context.get_or_insert_with(zstd_safe::CCtx::create);
            context.reset(ResetDirective::SessionAndParameters)?;
            context.set_parameter(CParameter::CompressionLevel(level))?;
            if level > ZSTD_LEVEL_OF_WINDOW_MAX {
                // Higher levels would take a window that readers need not accept.
                context.set_parameter(CParameter::WindowLog(ZSTD_WINDOW_LOG_MAX))?;
            }
            context.compress2(&mut out[at..], input)
        })
        .map_err(|code| io::Error::other(zstd_safe::get_error_name(code)))?;
    out.truncate(at + bytes);
    Ok(())
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Snappy, block by block: xerial's framing, or else the whole input as one raw block.
struct SnappyReader<'a> {
    rest: &'a [u8],
    framed: bool,
    bytes_max: usize,
    block: Vec<u8>,
    /// What of the block was not read yet: `block[at..len]`.
    at: usize,
    len: usize,
    decoder: snap::raw::Decoder,
}

impl<'a> SnappyReader<'a> {
    fn new(input: &'a [u8], bytes_max: usize) -> Self {
        let framed = input.starts_with(&XERIAL_MAGIC) && input.len() >= XERIAL_HEADER.len();
        let rest = if framed { &input[XERIAL_HEADER.len()..] } else { input };
        Self { rest, framed, bytes_max, block: Vec::new(), at: 0, len: 0, decoder: snap::raw::Decoder::new() }
    }

    fn next_block(&mut self) -> io::Result<()> {
        let block = if self.framed {
            let Some((bytes, rest)) = self.rest.split_first_chunk::<4>() else {
                return Err(invalid("a block's length is cut short"));
            };
            let bytes = u32::from_be_bytes(*bytes) as usize;
            let Some((block, rest)) = rest.split_at_checked(bytes) else {
                return Err(invalid("a block is longer than what is there"));
            };
            self.rest = rest;
            block
        } else {
            std::mem::take(&mut self.rest)
        };
        if block.is_empty() {
            return Err(invalid("an empty block"));
        }
        let bytes = snap::raw::decompress_len(block).map_err(io::Error::other)?;
        // The block's own claim is believed only where its size could bear it out.
        if bytes > block.len().saturating_mul(SNAPPY_RATIO_MAX) {
            return Err(invalid("a block says that it is larger than it can be"));
        }
        if bytes > self.bytes_max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if self.block.len() < bytes {
            self.block.resize(bytes, 0);
        }
        self.at = 0;
        self.len = 0;
        self.len = self.decoder.decompress(block, &mut self.block[..bytes]).map_err(io::Error::other)?;
        Ok(())
    }
}

impl Read for SnappyReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at == self.len {
            if self.rest.is_empty() {
                return Ok(0);
            }
            self.next_block()?;
        }
        let bytes = out.len().min(self.len - self.at);
        out[..bytes].copy_from_slice(&self.block[self.at..self.at + bytes]);
        self.at += bytes;
        Ok(bytes)
    }
}

/// One lz4 frame, and nothing behind it.
struct Lz4Reader<'a> {
    frame: lz4_flex::frame::FrameDecoder<&'a [u8]>,
}

impl<'a> Lz4Reader<'a> {
    fn new(input: &'a [u8]) -> io::Result<Self> {
        // The legacy frame, which the decoder would take as well, is none that Kafka knows, and has 8 MiB blocks.
        if !input.starts_with(&LZ4_MAGIC) {
            return Err(invalid("not an lz4 frame"));
        }
        Ok(Self { frame: lz4_flex::frame::FrameDecoder::new(input) })
    }
}

impl Read for Lz4Reader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let block = self.frame.fill_buf()?;
        let bytes = out.len().min(block.len());
        out[..bytes].copy_from_slice(&block[..bytes]);
        self.frame.consume(bytes);
        // A second frame would begin here; the decoder's buffers are made for the first one.
        if bytes == 0 && !out.is_empty() && !self.frame.get_ref().is_empty() {
            return Err(invalid("bytes behind the frame"));
        }
        Ok(bytes)
    }
}
